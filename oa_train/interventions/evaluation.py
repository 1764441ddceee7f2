"""What a frozen model does while it runs as each of several circuits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from oa_train.ablations.constants import Constants, replacements_of_sets
from oa_train.batches import Batch
from oa_train.interventions.base import scored_logits
from oa_train.interventions.nodes import node_logits
from oa_train.metrics.behaviour import is_correct, logit_difference
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.loading import CausalLM
from oa_train.shapes import Bool, Float, Tensor

# Rows of one model run: enough to keep a processor busy, few enough for the activations of a small model.
ROWS_PER_RUN = 512


@dataclass(frozen=True, eq=False)
class Behaviour:
    """Figures of every circuit on every prompt, on the CPU.

    Attributes:
        kl: KL divergence from the clean model, in nats.
        accuracy: 1 where the top token is an answer, else 0.
        logit_difference: log odds of the answers against the distractors, in nats.
    """

    kl: Float[Tensor, "circuit prompt"]
    accuracy: Float[Tensor, "circuit prompt"]
    logit_difference: Float[Tensor, "circuit prompt"]


@torch.no_grad()
def circuit_behaviour(
    model: CausalLM,
    batches: Iterable[Batch],
    masks: Bool[Tensor, "circuit component"],
    sets: Sequence[Constants],
    rows_per_run: int = ROWS_PER_RUN,
) -> Behaviour:
    """Run a model as each of several circuits on the same prompts.

    Args:
        model: frozen causal language model.
        batches: prompts, on any device.
        masks: a circuit in each row; false entries are ablated.
        sets: constants of each circuit, or one set for all.
        rows_per_run: most rows (circuits times prompts) of one model run; bounds memory.
    """
    found = [_one_batch(model, batch.to(model.device), masks, sets, rows_per_run) for batch in batches]
    return Behaviour(*(torch.cat(figures, dim=1).cpu() for figures in zip(*found, strict=True)))


@torch.no_grad()
def clean_behaviour(model: CausalLM, batches: Iterable[Batch]) -> Behaviour:
    """Run the model itself; its divergence from itself is 0."""
    found = []
    for batch in batches:
        shown = batch.to(model.device)
        logits = scored_logits(model, shown)
        found.append(_figures(logits, logits, shown, 1))
    return Behaviour(*(torch.cat(figures, dim=1).cpu() for figures in zip(*found, strict=True)))


def _one_batch(
    model: CausalLM, batch: Batch, masks: Tensor, sets: Sequence[Constants], rows_per_run: int
) -> tuple[Tensor, Tensor, Tensor]:
    clean = scored_logits(model, batch)
    at_once = max(1, rows_per_run // len(batch))
    found = []
    for start in range(0, len(masks), at_once):
        some = masks[start : start + at_once].to(model.device, torch.float32)
        their = sets if len(sets) == 1 else sets[start : start + at_once]
        rows = batch.repeat(len(some))
        logits = node_logits(
            model,
            rows,
            some.repeat_interleave(len(batch), dim=0),
            replacements_of_sets([one.to(model.device) for one in their], rows),
            their[0].bos_token_id,
        )
        found.append(_figures(clean.repeat(len(some), 1), logits, rows, len(some)))
    kl, accuracy, difference = (torch.cat(figures) for figures in zip(*found, strict=True))
    return kl, accuracy, difference


def _figures(clean: Tensor, logits: Tensor, rows: Batch, n_circuits: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (n_circuits, -1)
    return (
        kl_divergence(clean, logits).view(shape),
        is_correct(logits, rows.answers).float().view(shape),
        logit_difference(logits.float(), rows.answers, rows.distractors).view(shape),
    )
