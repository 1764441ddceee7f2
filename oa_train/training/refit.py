"""Training the constants of fixed circuits, any number of them side by side.

Each circuit has constants of its own and each step shows all circuits the same prompts, as copies in one batch. The
circuits do not touch each other, so this equals training them one after another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import Batch
from oa_train.errors import ConfigurationError, NotFiniteError
from oa_train.interventions.base import scored_logits
from oa_train.interventions.evaluation import ROWS_PER_RUN, circuit_behaviour, circuit_logits
from oa_train.metrics.measures import Loss, loss_of
from oa_train.models.loading import CausalLM
from oa_train.progress import Track, silent
from oa_train.shapes import Bool, Float, Tensor
from oa_train.tasks.base import Task


@dataclass(frozen=True)
class RefitSettings:
    """How constants of a fixed circuit are trained.

    Attributes:
        steps: steps of Adam; 0 keeps the best of the starts.
        batch_size: prompts of a step, shared by all circuits.
        learning_rate: of Adam at the start; it falls to zero along a cosine.
        evaluate_every: steps between two looks at the validation prompts; the best seen is kept.
        rows_per_run: most rows (circuits times prompts) of one model run; bounds memory, changes no result.
    """

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 0.01
    evaluate_every: int = 25
    rows_per_run: int = ROWS_PER_RUN

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigurationError(f"steps is {self.steps}; expected 0 or more.")
        for name in ("batch_size", "learning_rate", "evaluate_every", "rows_per_run"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; expected more than 0.")


@dataclass(frozen=True, eq=False)
class FittedConstants:
    """Constants of each circuit, the best seen by validation.

    Attributes:
        sets: the constants.
        validation_loss: their loss on the validation prompts, in nats.
    """

    sets: list[Constants]
    validation_loss: Float[Tensor, " circuit"]


def fit_constants(
    model: CausalLM,
    task: Task,
    masks: Bool[Tensor, "circuit component"],
    starts: Sequence[Constants],
    settings: RefitSettings,
    *,
    loss: Loss = "kl",
    others: Sequence[Constants] = (),
    track: Track = silent,
    description: str = "fitting constants",
) -> FittedConstants:
    """Train optimal-ablation constants for fixed circuits.

    Args:
        model: frozen causal language model.
        task: prompts; steps draw from its `refit` stream, the best is chosen on its `validation` stream.
        masks: a circuit in each row.
        starts: constants where training starts, of each circuit or one for all.
        settings: steps, learning rate and so on.
        loss: what is minimised.
        others: constants that are kept instead wherever they do better (zero or mean ablation, say), so that the
            result is never worse on the validation prompts.
        track: progress.
        description: what the progress bar says.

    Raises:
        NotFiniteError: the loss became NaN or infinite.
    """
    n_circuits = len(masks)
    constants = TrainableConstants([starts[i if len(starts) > 1 else 0] for i in range(n_circuits)]).to(model.device)
    best = _Best(model, task, masks, loss, settings.rows_per_run)
    for candidate in others:
        best.offer([candidate] * n_circuits)
    best.offer(constants.sets())
    optimizer = torch.optim.Adam(constants.parameters(), lr=settings.learning_rate)
    for step in track(range(settings.steps), description):
        optimizer.param_groups[0]["lr"] = (
            settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        )
        optimizer.zero_grad(set_to_none=True)
        batch = task.batch("refit", step, settings.batch_size).to(model.device)
        losses = _accumulate_gradient(model, batch, masks, constants, loss, settings.rows_per_run)
        if not torch.isfinite(losses).all():
            raise NotFiniteError(
                f"The loss of the constants is {float(losses.sum())} at step {step} of the refit. Lower its learning "
                "rate."
            )
        optimizer.step()
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            best.offer(constants.sets())
    return FittedConstants(best.sets, best.loss)


def circuit_losses(
    model: CausalLM,
    batch: Batch,
    clean: Float[Tensor, "batch scored vocabulary"],
    masks: Bool[Tensor, "circuit component"],
    sets: Sequence[Constants],
    loss: Loss,
) -> Float[Tensor, " circuit"]:
    """Mean loss of each circuit over the prompts, in one run of the model, with gradients to the constants.

    Args:
        model: frozen causal language model.
        batch: prompts.
        clean: what the unablated model predicts for them.
        masks: a circuit in each row.
        sets: the constants of each.
        loss: what is minimised.
    """
    logits = circuit_logits(model, batch, masks, sets)
    lost = loss_of(loss, clean.repeat(len(masks), 1, 1), logits, batch.repeat(len(masks)))
    return lost.view(len(masks), -1).mean(dim=1)


def _accumulate_gradient(
    model: CausalLM, batch: Batch, masks: Tensor, constants: TrainableConstants, loss: Loss, rows_per_run: int
) -> Float[Tensor, " circuit"]:
    with torch.no_grad():
        clean = scored_logits(model, batch)
    at_once = max(1, rows_per_run // len(batch))
    found = []
    for start in range(0, len(masks), at_once):
        some = slice(start, start + at_once)
        losses = circuit_losses(model, batch, clean, masks[some], constants.sets()[some], loss)
        # A sum over circuits: each circuit's gradient is that of its own mean, however many run beside it.
        losses.sum().backward()
        found.append(losses.detach())
    return torch.cat(found)


class _Best:
    """The best constants of each circuit so far, by the loss on the validation prompts."""

    def __init__(self, model: CausalLM, task: Task, masks: Tensor, loss: Loss, rows_per_run: int) -> None:
        self._model = model
        self._masks = masks
        self._name: Loss = loss
        self._rows_per_run = rows_per_run
        self._batches = list(task.batches("validation", task.n_validation))
        self.loss = torch.full((len(masks),), float("inf"))
        self.sets: list[Constants] = []

    def offer(self, sets: Sequence[Constants]) -> None:
        behaviour = circuit_behaviour(self._model, self._batches, self._masks, sets, self._rows_per_run)
        # What is not finite is never the best.
        found = behaviour.loss(self._name).mean(dim=1).nan_to_num(nan=float("inf"))
        if not self.sets:
            self.sets = [one.detach() for one in sets]
        for index in (found < self.loss).nonzero().flatten().tolist():
            self.sets[index] = sets[index].detach()
        self.loss = torch.minimum(self.loss, found)
