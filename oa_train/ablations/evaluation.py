"""What a frozen model does while it runs as each of several circuits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from oa_train.ablations.base import Ablation, SourceValues, replacements_of_copies
from oa_train.batches import Batch
from oa_train.engine.reading import source_values
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits, rows_within_memory
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES, Loss, measured
from oa_train.models.loading import CausalLM
from oa_train.shapes import Bool, Float, Tensor

# Rows of one model run: enough to keep a processor busy, few enough for the activations of a small model.
ROWS_PER_RUN = 512


@dataclass(frozen=True, eq=False)
class Behaviour:
    """Measures of every circuit on every prompt, averaged over the prompt's scored positions, on the CPU.

    Attributes:
        kl: KL divergence from the clean model, in nats.
        accuracy: share of the scored positions at which the top token is an answer.
        logit_difference: log odds of the answers against the distractors, in nats.
        cross_entropy: minus the log probability of the answers, in nats.
    """

    kl: Float[Tensor, "circuit prompt"]
    accuracy: Float[Tensor, "circuit prompt"]
    logit_difference: Float[Tensor, "circuit prompt"]
    cross_entropy: Float[Tensor, "circuit prompt"]

    def loss(self, name: Loss) -> Float[Tensor, "circuit prompt"]:
        """What is minimised under the loss of that name (see `metrics.measures.loss_of`)."""
        values: Tensor = getattr(self, name)
        return LOSS_SIGNS[name] * values


@torch.no_grad()
def circuit_behaviour(
    model: CausalLM,
    batches: Iterable[Batch],
    masks: Bool[Tensor, "circuit entry"],
    ablations: Sequence[Ablation],
    rows_per_run: int = ROWS_PER_RUN,
) -> Behaviour:
    """Run a model as each of several circuits on the same prompts.

    Args:
        model: frozen causal language model.
        batches: prompts, on any device.
        masks: a circuit in each row; false entries are ablated, be they components or edges.
        ablations: what replaces the ablated parts of each circuit, or one ablation for all.
        rows_per_run: most rows (circuits times prompts) of one model run; bounds memory.
    """
    there = [one.to(model.device) for one in ablations]
    return _gathered(_one_batch(model, batch.to(model.device), masks, there, rows_per_run) for batch in batches)


@torch.no_grad()
def clean_behaviour(model: CausalLM, batches: Iterable[Batch]) -> Behaviour:
    """Run the model itself; its divergence from itself is 0."""
    return _gathered(_one_clean_batch(model, batch.to(model.device)) for batch in batches)


def _gathered(found: Iterable[dict[str, Tensor]]) -> Behaviour:
    batches = list(found)
    return Behaviour(**{name: torch.cat([one[name] for one in batches], dim=1).cpu() for name in MEASURES})


def _one_clean_batch(model: CausalLM, batch: Batch) -> dict[str, Tensor]:
    logits = scored_logits(model, batch)
    return {name: measured(name, logits, logits, batch).unsqueeze(0) for name in MEASURES}


def _one_batch(
    model: CausalLM, batch: Batch, masks: Tensor, ablations: Sequence[Ablation], rows_per_run: int
) -> dict[str, Tensor]:
    most = rows_within_memory(model, batch, masks.shape[1])
    if len(batch) > most:
        parts = [_one_batch(model, part, masks, ablations, rows_per_run) for part in batch.pieces(most)]
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in MEASURES}
    clean = scored_logits(model, batch)
    at_once = max(1, min(rows_per_run, most) // len(batch))
    values_of = partial(source_values, model)
    # What stands in for all circuits may cost a run of the model, so it is asked for once.
    shared = ablations[0].replacements(batch, values_of) if len(ablations) == 1 else None
    found = []
    for start in range(0, len(masks), at_once):
        some = masks[start : start + at_once]
        copies = len(some)
        if shared is not None:
            replacements = shared.repeat(copies)
        else:
            their = ablations[start : start + at_once]
            replacements = replacements_of_copies(their, batch, copies, values_of)
        logits = _copies_logits(model, batch, some, replacements, ablations[0].bos_token_id)
        rows, repeated = batch.repeat(copies), clean.repeat(copies, 1, 1)
        found.append({name: measured(name, repeated, logits, rows).view(copies, -1) for name in MEASURES})
    return {name: torch.cat([one[name] for one in found]) for name in MEASURES}


def circuit_logits(
    model: CausalLM,
    batch: Batch,
    masks: Bool[Tensor, "circuit entry"],
    ablations: Sequence[Ablation],
    recompute: bool = False,
) -> Float[Tensor, "row scored vocabulary"]:
    """Logits of several circuits on the same prompts, in one run of the model.

    Args:
        model: frozen causal language model.
        batch: B prompts on the model's device.
        masks: a circuit in each of S rows.
        ablations: one for each circuit, or one for all; gradients flow to trained constants.
        recompute: see `scored_logits`.

    Returns:
        S * B rows, laid out as `batch.repeat(S)` lays out the prompts.
    """
    replacements = replacements_of_copies(ablations, batch, len(masks), partial(source_values, model))
    return _copies_logits(model, batch, masks, replacements, ablations[0].bos_token_id, recompute)


def _copies_logits(
    model: CausalLM,
    batch: Batch,
    masks: Tensor,
    replacements: SourceValues,
    bos_token_id: int | None,
    recompute: bool = False,
) -> Tensor:
    there = masks.to(batch.tokens.device, torch.float32).repeat_interleave(len(batch), dim=0)
    return masked_logits(model, batch.repeat(len(masks)), there, replacements, bos_token_id, recompute)
