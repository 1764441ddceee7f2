"""The best constants of each of several circuits so far."""

import torch
from torch import nn

from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.shapes import Bool, Float, Tensor


class BestConstants(nn.Module):
    """Keeps, for each circuit, the constants under which its loss was lowest.

    There is a table for each circuit, or one for all when no two circuits ablate the same component: then each
    circuit's constants stand in it side by side. Its state goes into checkpoints.

    Args:
        masks: a circuit in each row; false entries are ablated.
        tables: sets of constants of the right sizes, as many as there are circuits, or one.

    Attributes:
        loss: lowest loss of each circuit; infinite before the first offer.
    """

    def __init__(self, masks: Bool[Tensor, "circuit component"], tables: TrainableConstants) -> None:
        super().__init__()
        self.heads: Tensor
        self.mlps: Tensor
        self.loss: Tensor
        self._ablated: Tensor
        self.register_buffer("heads", tables.heads.detach().clone())
        self.register_buffer("mlps", tables.mlps.detach().clone())
        self.register_buffer("loss", torch.full((len(masks),), float("inf"), device=tables.heads.device))
        by_layer = (~masks).unflatten(-1, (tables.mlps.shape[1], -1)).to(tables.heads.device)
        self.register_buffer("_ablated", by_layer, persistent=False)
        self._bos_token_id = tables.bos_token_id

    @torch.no_grad()
    def offer(self, tables: TrainableConstants, loss: Float[Tensor, " circuit"]) -> None:
        """Take over what is better; what is not finite never is.

        Args:
            tables: constants of every circuit.
            loss: their loss.
        """
        for circuit in (loss.to(self.loss.device) < self.loss).nonzero().flatten().tolist():
            table = circuit if len(self.heads) > 1 else 0
            heads, mlps = self._ablated[circuit, :, :-1], self._ablated[circuit, :, -1]
            # The positions of a table stand between its layers and heads.
            self.heads[table].transpose(1, 2)[heads] = tables.heads[table].transpose(1, 2)[heads]
            self.mlps[table][mlps] = tables.mlps[table][mlps]
            self.loss[circuit] = loss[circuit]

    def sets(self) -> list[Constants]:
        """The constants of each circuit, or the one table that all share."""
        tables = zip(self.heads.unbind(), self.mlps.unbind(), strict=True)
        return [Constants(heads.clone(), mlps.clone(), self._bos_token_id) for heads, mlps in tables]


def share_a_table(masks: Bool[Tensor, "circuit component"]) -> bool:
    """Whether no two circuits ablate the same component, so that one table holds the constants of all."""
    return bool((~masks).sum(dim=0).le(1).all())
