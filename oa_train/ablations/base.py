"""What stands in for components: values, and the ablations that supply them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from oa_train.batches import Batch
from oa_train.shapes import Float, Tensor


@dataclass(frozen=True, eq=False)
class NodeValues:
    """A value for every component, row and position; where it replaces others, dimensions of size 1 stand for all.

    Attributes:
        heads: value of each head, the input of the attention output projection.
        mlps: output of each MLP.
    """

    heads: Float[Tensor, "layer row_or_1 position_or_1 head d_head"]
    mlps: Float[Tensor, "layer row_or_1 position_or_1 d_model"]

    def repeat(self, times: int) -> "NodeValues":
        """The values of `Batch.repeat`: row `s * B + b` is row `b` again; what stands for all rows stays as it is."""
        if times == 1 or self.heads.shape[1] == 1:
            return self
        return NodeValues(self.heads.repeat(1, times, 1, 1, 1), self.mlps.repeat(1, times, 1, 1))


# Runs the clean model on prompts and returns the values of its components.
ValuesOf = Callable[[Batch], NodeValues]


class Ablation(ABC):
    """A source of replacements for the components of any prompts.

    What it supplies for a prompt depends on the prompt and its number alone, never on the other prompts of a batch
    or on what was asked before.

    Attributes:
        bos_token_id: token that is never replaced at the first position.
    """

    bos_token_id: int | None

    @abstractmethod
    def replacements(self, batch: Batch, values_of: ValuesOf) -> NodeValues:
        """NodeValues for every row of a batch.

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
) -> NodeValues:
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
    return NodeValues(
        heads=torch.cat([one.heads.expand(-1, len(batch), width, -1, -1) for one in laid], dim=1),
        mlps=torch.cat([one.mlps.expand(-1, len(batch), width, -1) for one in laid], dim=1),
    )
