"""The best constants of each of several circuits so far."""

import torch
from torch import nn

from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.shapes import Bool, Float, Tensor


class BestConstants(nn.Module):
    """Keeps, for each circuit, the constants under which its loss was lowest.

    There is a table for each circuit, or one for all when no two circuits replace the same source: then each
    circuit's constants stand in it side by side. Its state goes into checkpoints.

    Args:
        replaced: sources that each circuit replaces.
        tables: sets of constants of the right sizes, as many as there are circuits, or one.

    Attributes:
        loss: lowest loss of each circuit; infinite before the first offer.
    """

    def __init__(self, replaced: Bool[Tensor, "circuit source"], tables: TrainableConstants) -> None:
        super().__init__()
        self.inputs: Tensor
        self.heads: Tensor
        self.mlps: Tensor
        self.loss: Tensor
        self._replaced: Tensor
        self.register_buffer("inputs", tables.inputs.detach().clone())
        self.register_buffer("heads", tables.heads.detach().clone())
        self.register_buffer("mlps", tables.mlps.detach().clone())
        self.register_buffer("loss", torch.full((len(replaced),), float("inf"), device=tables.heads.device))
        self.register_buffer("_replaced", replaced.to(tables.heads.device), persistent=False)
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
            by_layer = self._replaced[circuit, 1:].unflatten(0, (self.mlps.shape[1], -1))
            inputs, heads, mlps = self._replaced[circuit, :1], by_layer[:, :-1], by_layer[:, -1]
            self.inputs[table][inputs] = tables.inputs[table][inputs]
            # The positions of a table stand between its layers and heads.
            self.heads[table].transpose(1, 2)[heads] = tables.heads[table].transpose(1, 2)[heads]
            self.mlps[table][mlps] = tables.mlps[table][mlps]
            self.loss[circuit] = loss[circuit]

    def sets(self) -> list[Constants]:
        """The constants of each circuit, or the one table that all share."""
        tables = zip(self.inputs.clone(), self.heads.clone(), self.mlps.clone(), strict=True)
        return [Constants.from_tensors(table, self._bos_token_id) for table in tables]


def share_a_table(replaced: Bool[Tensor, "circuit source"]) -> bool:
    """Whether no two circuits replace the same source, so that one table holds the constants of all."""
    return bool(replaced.sum(dim=0).le(1).all())
