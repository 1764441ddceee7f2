"""The record that tasks make and models, interventions and metrics read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from oa_train.errors import TaskError
from oa_train.shapes import Bool, Float, Int, Tensor

TensorFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of equal padded length, scored at one position or at several.

    Attributes:
        tokens: token ids; padded on the left or on the right.
        attention_mask: True at real tokens, False at padding.
        scored: columns of the positions whose next-token predictions are scored, from left to right. A prompt with
            fewer than others repeats its last one.
        weights: part of each scored position in the prompt's average; they sum to 1, and repetitions have 0.
        answers: ids of the tokens that are correct there, padded with -1.
        distractors: ids of the wrong tokens that answers are compared with, padded with -1.
        counterfactual_tokens: the same prompts with other content, token for token parallel to `tokens`.
        example_ids: number of each prompt within its stream.
        padded: whether any row has padding; kept beside the mask so that no device synchronisation is
            needed to learn it.
    """

    tokens: Int[Tensor, "batch position"]
    attention_mask: Bool[Tensor, "batch position"]
    scored: Int[Tensor, "batch scored"]
    weights: Float[Tensor, "batch scored"]
    answers: Int[Tensor, "batch scored answer"]
    distractors: Int[Tensor, "batch scored distractor"]
    counterfactual_tokens: Int[Tensor, "batch position"] | None
    example_ids: Int[Tensor, " batch"]
    padded: bool

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def positions(self) -> Int[Tensor, "batch position"]:
        """Position of each token counted from its row's first real token; 0 at padding before it."""
        return (self.attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens of each prompt."""
        return self.attention_mask.sum(dim=1)

    def average(self, values: Float[Tensor, "batch scored"]) -> Float[Tensor, " batch"]:
        """Each prompt's mean of a figure over its scored positions."""
        return (values * self.weights.to(values.dtype)).sum(dim=1)

    def _map(self, function: TensorFunction) -> "Batch":
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy every tensor to `device` but the prompts' numbers, by which generators are seeded on the CPU."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, example_ids=self.example_ids)

    def repeat(self, times: int) -> "Batch":
        """Tile the batch: row `s * len(self) + b` is prompt `b` again.

        Args:
            times: number of copies; 1 returns the batch itself.
        """
        if times == 1:
            return self
        return self._map(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    def rows(self, chosen: slice) -> "Batch":
        """Some of the rows, padded as before."""
        return self._map(lambda tensor: tensor[chosen])

    def pieces(self, most: int) -> "Iterator[Batch]":
        """The batch in pieces of at most so many rows; itself where it is small enough."""
        if len(self) <= most:
            yield self
            return
        for first in range(0, len(self), most):
            yield self.rows(slice(first, first + most))

    def counterfactual(self) -> "Batch":
        """The same batch with the counterfactual prompts in place of the prompts.

        Raises:
            TaskError: the task made no counterfactuals.
        """
        if self.counterfactual_tokens is None:
            raise TaskError(
                "These prompts have no counterfactuals: their task makes none, so there is no counterfactual "
                "ablation. Choose another ablation, or let the task's prompts name a counterfactual each."
            )
        return replace(self, tokens=self.counterfactual_tokens, counterfactual_tokens=None)


def unanswered(tokens: Int[Tensor, "batch position"], attention_mask: Bool[Tensor, "batch position"]) -> Batch:
    """A batch of prompts without answers, each scored at its last real token.

    Args:
        tokens: token ids; padded on the left or on the right.
        attention_mask: True at real tokens; every row has one.
    """
    n_rows, width = tokens.shape
    columns = torch.arange(width, device=tokens.device)
    none = torch.full((n_rows, 1, 1), -1, device=tokens.device)
    return Batch(
        tokens=tokens,
        attention_mask=attention_mask,
        scored=torch.where(attention_mask, columns, 0).amax(dim=1, keepdim=True),
        weights=torch.ones(n_rows, 1, device=tokens.device),
        answers=none,
        distractors=none,
        counterfactual_tokens=None,
        example_ids=torch.arange(n_rows, device=tokens.device),
        padded=not bool(attention_mask.all()),
    )
