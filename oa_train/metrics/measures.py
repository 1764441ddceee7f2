"""Measures of an ablated model, one value per prompt, and the losses derived from them."""

from collections.abc import Callable
from typing import Literal

from oa_train.batches import Batch
from oa_train.checks import check_choice
from oa_train.metrics.behaviour import cross_entropy, is_correct, logit_difference
from oa_train.metrics.divergence import kl_divergence
from oa_train.shapes import Float, Tensor

# Maps clean logits, ablated logits and their batch to a value at each scored position.
_Measure = Callable[[Tensor, Tensor, Batch], Tensor]


def _divergence(clean: Tensor, logits: Tensor) -> Tensor:
    by_copy = logits.unflatten(0, (-1, len(clean)))
    return kl_divergence(clean, by_copy).flatten(0, 1)


MEASURES: dict[str, _Measure] = {
    "kl": lambda clean, logits, batch: _divergence(clean, logits),
    "accuracy": lambda clean, logits, batch: is_correct(logits, batch.answers).to(logits.dtype),
    "logit_difference": lambda clean, logits, batch: logit_difference(logits, batch.answers, batch.distractors),
    "cross_entropy": lambda clean, logits, batch: cross_entropy(logits, batch.answers),
}

Loss = Literal["kl", "cross_entropy", "logit_difference"]

# Losses are minimised; a large logit difference is good, so its sign is flipped.
LOSS_SIGNS: dict[Loss, int] = {"kl": 1, "cross_entropy": 1, "logit_difference": -1}


def measured(
    name: str,
    clean: Float[Tensor, "prompt scored vocabulary"],
    logits: Float[Tensor, "batch scored vocabulary"],
    batch: Batch,
) -> Float[Tensor, " batch"]:
    """A measure (a key of `MEASURES`) of every row of a batch, averaged over its scored positions.

    In nats, or between 0 and 1 for accuracy; float32, or float64 for float64 `logits`. The rows are the prompts of the
    clean logits, or copies of them in the order of `Batch.repeat`.
    """
    # Half precision is too coarse for differences of logits.
    precise = logits if logits.dtype.itemsize == 8 else logits.float()
    return batch.average(MEASURES[name](clean, precise, batch))


def check_loss(option: str, name: str) -> None:
    """Raise a `ConfigurationError` that names the option if the loss is unknown."""
    check_choice(option, name, LOSS_SIGNS)


def loss_of(
    name: Loss,
    clean: Float[Tensor, "prompt scored vocabulary"],
    logits: Float[Tensor, "batch scored vocabulary"],
    batch: Batch,
) -> Float[Tensor, " batch"]:
    """Loss of every row: a measure (see `measured`), with its sign flipped if more is better.

    `kl` is the divergence from the clean model, `cross_entropy` is that of the task's answers, and `logit_difference`
    compares answers with distractors. The last is unbounded: a circuit that is more confident than the model scores
    better.
    """
    return LOSS_SIGNS[name] * measured(name, clean, logits, batch)
