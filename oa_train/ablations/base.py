"""What stands in for what a model's parts write: values, and the ablations that supply them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from oa_train.batches import Batch
from oa_train.shapes import Float, Tensor


@dataclass(frozen=True, eq=False)
class SourceValues:
    """A value for every source, row and position; where it replaces others, dimensions of size 1 stand for all.

    Sources are what writes to the residual stream: the embedding and the components. Only where edges are cut is the
    embedding ever replaced.

    Attributes:
        inputs: the embedding, which enters the first block.
        heads: value of each head, the input of the attention output projection.
        mlps: output of each MLP.
    """

    inputs: Float[Tensor, "1 row_or_1 position_or_1 d_model"]
    heads: Float[Tensor, "layer row_or_1 position_or_1 head d_head"]
    mlps: Float[Tensor, "layer row_or_1 position_or_1 d_model"]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, heads and MLPs; rows are dimension 1 and positions dimension 2 of each."""
        return self.inputs, self.heads, self.mlps

    def repeat(self, times: int) -> "SourceValues":
        """The values of `Batch.repeat`: row `s * B + b` is row `b` again; what stands for all rows stays as it is."""
        if times == 1 or self.heads.shape[1] == 1:
            return self
        return SourceValues(*(one.repeat(1, times, *[1] * (one.dim() - 2)) for one in self.tensors()))


# Runs the clean model on prompts and returns what its sources have.
ValuesOf = Callable[[Batch], SourceValues]


class Ablation(ABC):
    """Supplies replacements for what a model's sources write on any prompts.

    What it supplies for a prompt depends on the prompt and its number alone, never on the other prompts of a batch
    or on what was asked before.

    Attributes:
        bos_token_id: token that is never replaced at the first position.
    """

    bos_token_id: int | None

    @abstractmethod
    def replacements(self, batch: Batch, values_of: ValuesOf) -> SourceValues:
        """Values for every row of a batch.

        Args:
            batch: the prompts whose components are replaced.
            values_of: runs the clean model.
        """

    def to(self, device: torch.device | str) -> "Ablation":
        """The same ablation with its tensors, if it has any, on a device."""
        del device
        return self


def replacements_of_copies(
    ablations: Sequence[Ablation], batch: Batch, copies: int, values_of: ValuesOf
) -> SourceValues:
    """Lay out replacements for the copies of a batch that `Batch.repeat` makes.

    Args:
        ablations: one for all copies, or one for each.
        batch: the prompts, once.
        copies: how often they are repeated.
        values_of: runs the clean model.
    """
    if len(ablations) == 1:
        return ablations[0].replacements(batch, values_of).repeat(copies)
    laid = [one.replacements(batch, values_of) for one in ablations]
    # Beside an ablation with a value for each position, one with a single value gives it to all of them.
    width = max(one.heads.shape[2] for one in laid)
    together = zip(*(one.tensors() for one in laid), strict=True)
    return SourceValues(
        *(torch.cat([_expanded(one, len(batch), width) for one in alike], dim=1) for alike in together)
    )


def _expanded(values: Tensor, rows: int, positions: int) -> Tensor:
    return values.expand(-1, rows, positions, *values.shape[3:])
