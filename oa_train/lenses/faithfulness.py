"""Causal faithfulness of lenses (Li & Janson 2024, section 5): do changes affect model and lens in the same way?

The residual stream of a prompt's scored token is changed at a layer, once inside the model and once in the input of
the lens. For a faithful lens the two effects are correlated in size across directions, and similar in direction.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.engine.tail import read_out, scored_stream
from oa_train.errors import TaskError
from oa_train.lenses.lens import Lens
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.frozen import CausalLM
from oa_train.models.hooks import Tap
from oa_train.models.parts import find_parts
from oa_train.seeds import torch_generator
from oa_train.shapes import Float, Tensor

# Added to the diagonal of the covariance of the residual stream to make it positive definite.
RIDGE = 3e-4

# Number of bisection steps in the search for a step size.
BISECTIONS = 8


@dataclass(frozen=True, eq=False)
class StreamStatistics:
    """Mean and Cholesky factor of the covariance of the residual stream at a layer, over prompts, in float64."""

    mean: Float[Tensor, " d_model"]
    factor: Float[Tensor, "d_model d_model"]

    @classmethod
    def of(cls, residuals: Float[Tensor, "prompt d_model"]) -> "StreamStatistics":
        """Compute the statistics of these residual streams."""
        values = residuals.double()
        mean = values.mean(dim=0)
        covariance = (values - mean).mT @ (values - mean) / (len(values) - 1)
        ridge = RIDGE * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        return cls(mean, torch.linalg.cholesky(covariance + ridge))

    def random_directions(self, n_directions: int, *seed: int | str) -> Float[Tensor, "direction d_model"]:
        """Unit vectors in the directions of samples from a normal distribution with the stream's covariance."""
        generator = torch_generator("directions", *seed)
        draws = torch.randn(n_directions, len(self.mean), dtype=torch.float64, generator=generator)
        return F.normalize(draws.to(self.factor.device) @ self.factor.mT, dim=-1)

    def basis(self, matrix: Float[Tensor, "d_model d_model"], n_directions: int) -> Float[Tensor, "direction d_model"]:
        """Directions of the stream to which an affine lens with this matrix is most sensitive.

        The leading right singular vectors of `matrix @ factor`, mapped by `factor` and normalised.
        """
        _, _, right = torch.linalg.svd(matrix.to(self.factor) @ self.factor)
        return F.normalize(right[:n_directions] @ self.factor.mT, dim=-1)


def steered(
    streams: Float[Tensor, "prompt d_model"],
    directions: Float[Tensor, "direction d_model"],
    step: float,
    *seed: int | str,
) -> Float[Tensor, "direction prompt d_model"]:
    """Streams moved along each direction by `step` times a standard normal sample per prompt and direction."""
    generator = torch_generator("steering", *seed)
    lengths = torch.randn(len(directions), len(streams), 1, generator=generator).to(streams.device)
    return (streams + step * lengths * directions.unsqueeze(1)).to(streams.dtype)


def projected(
    streams: Float[Tensor, "prompt d_model"],
    directions: Float[Tensor, "direction d_model"],
    mean: Float[Tensor, " d_model"],
) -> Float[Tensor, "direction prompt d_model"]:
    """Streams with each one's deviation from the mean along a direction removed."""
    units, centred = directions.to(streams.dtype), streams - mean.to(streams.dtype)
    return streams - (centred @ units.mT).mT.unsqueeze(-1) * units.unsqueeze(1)


def resampled(
    streams: Float[Tensor, "prompt d_model"], directions: Float[Tensor, "direction d_model"], size: int
) -> Float[Tensor, "subspace prompt d_model"]:
    """Streams whose component in the span of each group of `size` directions is replaced by the next prompt's."""
    changed = []
    for group in directions.split(size):
        basis, _ = torch.linalg.qr(group.mT)
        units = basis.to(streams.dtype)
        changed.append(streams + (streams.roll(-1, 0) - streams) @ units @ units.mT)
    return torch.stack(changed)


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of changes on the model and on a lens.

    Attributes:
        model: KL divergence of the changed model from the model, in nats.
        lens: KL divergence of the lens's prediction after the change from the one before, in nats.
        similarity: cosine similarity of the two changes in log probability; see `log_change_similarity`.
    """

    model: Float[Tensor, "change prompt"]
    lens: Float[Tensor, "change prompt"]
    similarity: Float[Tensor, "change prompt"]


class Intervened:
    """Changes the residual streams of prompts at the input of one layer, and measures the effects.

    Streams are changed at the scored token. A model run has at most `rows_per_run` rows (changes times prompts).

    Raises:
        TaskError: the prompts are scored at several positions.
    """

    def __init__(self, model: CausalLM, batch: Batch, layer: int, rows_per_run: int) -> None:
        if batch.scored.shape[1] != 1:
            raise TaskError(
                "Streams are changed at one token of each prompt, but these prompts are scored at "
                f"{batch.scored.shape[1]}. Score the last position alone (Text: scored last)."
            )
        self._model, self._batch, self._layer, self._rows_per_run = model, batch, layer, rows_per_run
        stream = scored_stream(model, batch)
        self.streams: Float[Tensor, "prompt d_model"] = stream.residuals[layer, :, 0]
        self.clean: Float[Tensor, "prompt vocabulary"] = stream.logits[:, 0]

    @torch.no_grad()
    def logits(self, streams: Float[Tensor, "change prompt d_model"]) -> Float[Tensor, "change prompt vocabulary"]:
        """The model's logits at the scored token when its streams are replaced by these."""
        at_once = max(1, self._rows_per_run // len(self._batch))
        return torch.cat([self._run(part) for part in streams.split(at_once)])

    def _run(self, streams: Tensor) -> Tensor:
        rows = self._batch.repeat(len(streams))
        columns = rows.scored[:, 0]

        def change(tensor: Tensor) -> Tensor:
            shaped = tensor.reshape(*rows.tokens.shape, -1).clone()
            shaped[torch.arange(len(rows), device=columns.device), columns] = streams.flatten(0, 1).to(tensor.dtype)
            return shaped.reshape(tensor.shape)

        block = find_parts(self._model).blocks[self._layer]
        logits: Tensor = scored_logits(self._model, rows, [Tap(block, "input", change)])[:, 0]
        return logits.view(len(streams), len(self._batch), -1)

    def model_effects(self, streams: Float[Tensor, "change prompt d_model"]) -> Float[Tensor, "change prompt"]:
        """KL divergence of the changed model from the model, in nats."""
        return kl_divergence(self.clean, self.logits(streams))

    @torch.no_grad()
    def effects(self, lens: Lens, streams: Float[Tensor, "change prompt d_model"], logits: Tensor) -> Effects:
        """Effects of changes on the model and on a lens; `logits` are those of the changed model."""
        before = _read(lens, self._model, self.streams.unsqueeze(0))[0]
        after = torch.cat([_read(lens, self._model, change.unsqueeze(0)) for change in streams])
        return Effects(
            kl_divergence(self.clean, logits),
            kl_divergence(before, after),
            log_change_similarity(self.clean, logits, before, after),
        )


def _read(lens: Lens, model: CausalLM, streams: Float[Tensor, "one prompt d_model"]) -> Tensor:
    final = lens(model, streams)
    return read_out(model, final[0]).unsqueeze(0)


def log_change_similarity(
    clean: Float[Tensor, "prompt vocabulary"],
    changed: Float[Tensor, "change prompt vocabulary"],
    before: Float[Tensor, "prompt vocabulary"],
    after: Float[Tensor, "change prompt vocabulary"],
) -> Float[Tensor, "change prompt"]:
    """Cosine similarity of the changes in log probability of the model (clean to changed) and of the lens.

    Both changes are centred and weighted by the clean model's probabilities: the Aitchison-type similarity of Li &
    Janson (2024), 1 if the lens changes as the model does, up to a positive factor.
    """
    p = clean.double().softmax(dim=-1)

    def centred(first: Tensor, second: Tensor) -> Tensor:
        change = second.double().log_softmax(dim=-1) - first.double().log_softmax(dim=-1)
        return change - (p * change).sum(dim=-1, keepdim=True)

    of_model, of_lens = centred(clean, changed), centred(before, after)
    norms = (p * of_model.square()).sum(-1) * (p * of_lens.square()).sum(-1)
    return (p * of_model * of_lens).sum(-1) / norms.sqrt().clamp(min=1e-12)


def calibrated_step(effect: Callable[[float], float], target: float, largest: float) -> float:
    """Largest step in [0, `largest`] whose effect stays below `target`; the effect must increase with the step."""
    low, high = 0.0, largest
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if effect(middle) < target else (low, middle)
    return low


def layers_between(layers: list[int], number: int) -> Iterator[int]:
    """At most `number` evenly spaced layers; the first one is left out if there are others."""
    inner = layers[1:] or layers
    for n in range(min(number, len(inner))):
        yield inner[(2 * n + 1) * len(inner) // (2 * min(number, len(inner)))]
