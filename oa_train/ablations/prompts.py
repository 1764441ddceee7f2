"""Ablations that take a unit's value from another run: resample, counterfactual and clean."""

from collections.abc import Callable, Sequence

import torch

from oa_train.ablations.base import Ablation, ValuesOf
from oa_train.batches import Batch
from oa_train.engine.values import Values
from oa_train.errors import TaskError
from oa_train.shapes import Int, Tensor

# Maps a batch to another prompt for each of its prompts, aligned with it token by token.
OtherPrompts = Callable[[Batch], Batch]


class OtherPromptAblation(Ablation):
    """Replaces each unit's value by its value at the same position of another prompt.

    With prompts drawn at random this is resample ablation; with the counterfactual of each prompt it is counterfactual
    ablation, which is not total: what the two prompts share is kept. With the prompt itself it restores the clean
    value after earlier units were replaced. At a span the value is taken from the same span of the other prompt.

    Args:
        other_prompts: returns the other prompt of each prompt; deterministic.
        spans: spans of the ablated entries.
    """

    def __init__(self, other_prompts: OtherPrompts, spans: Sequence[str | None] = (None,)) -> None:
        self._other_prompts, self._spans = other_prompts, tuple(spans)

    def replacements(self, batch: Batch, values_of: ValuesOf) -> Values:
        """Values of the clean model on the other prompts; raises `TaskError` if spans are not equally long."""
        others = self._other_prompts(batch)
        values = values_of(others)
        if self._spans == (None,):
            return values
        return Values(values.tensors, {span: _same_place(batch, others, span) for span in self._spans})


def _same_place(batch: Batch, others: Batch, span: str | None) -> Int[Tensor, "row position"]:
    """For each token of a span, the column of the token at the same offset in the other prompt's span."""
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens).clone()
    if span is None:
        return columns
    own, other = batch.layout.span(span), others.layout.span(span)
    if not torch.equal(own.sum(dim=1), other.sum(dim=1)):
        row = int((own.sum(dim=1) != other.sum(dim=1)).nonzero()[0])
        raise TaskError(
            f"The span {span!r} has {int(own[row].sum())} tokens in prompt {row} of a batch and "
            f"{int(other[row].sum())} in the prompt that its replacements come from. Use spans of equal length, or "
            "another ablation."
        )
    columns[own] = columns[other]
    return columns
