"""Behaviour of a frozen model as each of several circuits."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import torch

from oa_train.ablations.base import Ablation, replacements_of_copies
from oa_train.batches import Batch
from oa_train.engine.chunks import ROWS_PER_RUN, chunks
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import copies_logits
from oa_train.engine.reading import read_values
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES, Loss, measured
from oa_train.models.frozen import CausalLM
from oa_train.models.levels import Level
from oa_train.progress import Advance
from oa_train.shapes import Bool, Float, Int, Tensor

# Most bytes of clean logits that are kept for reuse.
CLEAN_BYTES = 2**30


@dataclass(frozen=True, eq=False)
class Behaviour:
    """Metrics of every circuit on every prompt, averaged over the prompt's scored positions, on the CPU.

    Attributes:
        kl: KL divergence from the clean model, in nats.
        accuracy: share of the scored positions whose top token is an answer.
        logit_difference: log odds of the answers against the distractors, in nats.
        cross_entropy: minus the log probability of the answers, in nats.
        identities: a hash of each prompt, equal for prompts with the same tokens.
    """

    kl: Float[Tensor, "circuit prompt"]
    accuracy: Float[Tensor, "circuit prompt"]
    logit_difference: Float[Tensor, "circuit prompt"]
    cross_entropy: Float[Tensor, "circuit prompt"]
    identities: Int[Tensor, " prompt"] | None = None

    def loss(self, name: Loss) -> Float[Tensor, "circuit prompt"]:
        """The loss with that name; see `metrics.measures.loss_of`."""
        values: Tensor = getattr(self, name)
        return LOSS_SIGNS[name] * values


class CleanLogits:
    """Clean logits of batches at their scored positions, on the CPU, computed once for each batch.

    Beyond `most_bytes` they are computed again each time.
    """

    def __init__(self, model: CausalLM, most_bytes: int = CLEAN_BYTES) -> None:
        self._model, self._free = model, most_bytes
        self._kept: dict[Batch, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Float[Tensor, "row scored vocabulary"]:
        """Logits of a batch, which may be on any device."""
        if batch in self._kept:
            return self._kept[batch]
        logits = scored_logits(self._model, batch.to(self._model.device)).cpu()
        if logits.nbytes <= self._free:
            self._kept[batch], self._free = logits, self._free - logits.nbytes
        return logits


@torch.no_grad()
def circuit_behaviour(
    model: CausalLM,
    batches: Iterable[Batch],
    level: Level,
    masks: Bool[Tensor, "circuit entry"] | Float[Tensor, "circuit entry"],
    ablations: Sequence[Ablation],
    rows_per_run: int = ROWS_PER_RUN,
    clean: CleanLogits | None = None,
    advance: Advance = lambda done: None,
) -> Behaviour:
    """Run a model as each of several circuits on the same prompts.

    Args:
        model: frozen causal language model.
        batches: prompts, on any device.
        level: level of the masks.
        masks: a circuit in each row; false entries are ablated, and numbers in [0, 1] mix.
        ablations: the ablation of each circuit, or one for all.
        rows_per_run: most rows (circuits times prompts) of one model run; limits memory, not results.
        clean: cache of clean logits, for when the same batches are evaluated again.
        advance: counts finished rows.
    """
    clean, values_of = clean or CleanLogits(model), partial(read_values, model, level=level)
    ablations, results = [ablation.to(model.device) for ablation in ablations], []
    for batch in batches:
        for piece, unmasked, slices in pieces(model, batch, clean(batch), level, masks, rows_per_run):
            # Replacements may cost a run of the model, so those that all circuits share are computed once.
            shared = ablations[0].replacements(piece, values_of) if len(ablations) == 1 else None
            measures = []
            for circuits in slices:
                copies = circuits.stop - circuits.start
                if shared is not None:
                    values = shared.repeat(copies)
                else:
                    values = replacements_of_copies(ablations[circuits], piece, copies, values_of)
                logits = copies_logits(model, piece, level, masks[circuits], values)
                measures.append(_measures(unmasked, logits, piece, copies))
                advance(copies * len(piece))
            results.append((piece, {name: torch.cat([part[name] for part in measures]) for name in MEASURES}))
    return _gathered(results)


def pieces(
    model: CausalLM,
    batch: Batch,
    clean: Float[Tensor, "row scored vocabulary"],
    level: Level,
    masks: Tensor,
    rows_per_run: int,
    gradients: bool = False,
) -> Iterator[tuple[Batch, Tensor, list[slice]]]:
    """The pieces of `chunks` on the model's device, each with its clean logits."""
    first = 0
    for piece, slices in chunks(model, level, batch.to(model.device), masks, rows_per_run, gradients):
        yield piece, clean[first : first + len(piece)].to(model.device), slices
        first += len(piece)


@torch.no_grad()
def clean_behaviour(model: CausalLM, batches: Iterable[Batch], clean: CleanLogits | None = None) -> Behaviour:
    """Run the model itself; its divergence from itself is 0."""
    clean = clean or CleanLogits(model)
    return _gathered((batch, _measures(logits := clean(batch), logits, batch.to("cpu"))) for batch in batches)


def _gathered(pieces: Iterable[tuple[Batch, dict[str, Tensor]]]) -> Behaviour:
    identities, measures = zip(*((prompt_identities(batch), measures) for batch, measures in pieces), strict=True)
    return Behaviour(
        **{name: torch.cat([of_piece[name] for of_piece in measures], dim=1).cpu() for name in MEASURES},
        identities=torch.cat(identities),
    )


def prompt_identities(batch: Batch) -> Int[Tensor, " prompt"]:
    """A hash of each prompt's tokens."""
    rows = zip(batch.tokens.cpu(), batch.attention_mask.cpu(), strict=True)
    digests = (blake2b(tokens[real].numpy().tobytes(), digest_size=8).digest() for tokens, real in rows)
    return torch.tensor([int.from_bytes(digest, signed=True) for digest in digests])


def _measures(clean: Tensor, logits: Tensor, batch: Batch, copies: int = 1) -> dict[str, Tensor]:
    rows = batch.repeat(copies)
    return {name: measured(name, clean, logits, rows).view(copies, -1) for name in MEASURES}


def circuit_logits(
    model: CausalLM,
    batch: Batch,
    level: Level,
    masks: Bool[Tensor, "circuit entry"],
    ablations: Sequence[Ablation],
) -> Float[Tensor, "row scored vocabulary"]:
    """Logits of S circuits on the same B prompts, in one run of the model, laid out as `batch.repeat(S)`.

    There is an ablation for each circuit, or one for all; gradients flow to trained constants. The batch is on the
    model's device.
    """
    values = replacements_of_copies(ablations, batch, len(masks), partial(read_values, model, level=level))
    return copies_logits(model, batch, level, masks, values)
