"""The record that tasks make and models, interventions and metrics read."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from oa_train.shapes import Bool, Int, Tensor

TensorFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of equal padded length, each scored at one position.

    Attributes:
        tokens: token ids; padded on the left or on the right.
        attention_mask: True at real tokens, False at padding.
        scored: column of the position whose next-token prediction is scored.
        answers: ids of the tokens that are correct there, padded with -1.
        distractors: ids of the wrong tokens that answers are compared with, padded with -1.
        counterfactual_tokens: the same prompts with other content, token for token parallel to `tokens`.
        example_ids: number of each prompt within its stream.
        padded: whether any row has padding; kept beside the mask so that no device synchronisation is
            needed to learn it.
    """

    tokens: Int[Tensor, "batch position"]
    attention_mask: Bool[Tensor, "batch position"]
    scored: Int[Tensor, " batch"]
    answers: Int[Tensor, "batch answer"]
    distractors: Int[Tensor, "batch distractor"]
    counterfactual_tokens: Int[Tensor, "batch position"] | None
    example_ids: Int[Tensor, " batch"]
    padded: bool

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def positions(self) -> Int[Tensor, "batch position"]:
        """Position of each token counted from its row's first real token; 0 at padding before it."""
        return (self.attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)

    def _map(self, function: TensorFunction) -> "Batch":
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy every tensor to `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy every tensor to page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

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

    def counterfactual(self) -> "Batch":
        """The same batch with the counterfactual prompts in place of the prompts.

        Raises:
            ValueError: the task made no counterfactuals.
        """
        if self.counterfactual_tokens is None:
            raise ValueError("These prompts have no counterfactuals; the task does not make any.")
        return replace(self, tokens=self.counterfactual_tokens, counterfactual_tokens=None)
