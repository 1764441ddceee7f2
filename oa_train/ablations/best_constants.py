"""The best constants so far of each of several circuits."""

import torch
from torch import nn

from oa_train.ablations.constants import Constants, Slots, TrainableConstants, unstacked
from oa_train.models.levels import Level
from oa_train.models.sites import Site
from oa_train.shapes import Bool, Float, Tensor

# Units that each circuit replaces, for each span that has its own slot.
Replaced = dict[Site, Bool[Tensor, "circuit span_or_1 unit"]]


class BestConstants(nn.Module):
    """The constants with the lowest loss so far for each circuit, as buffers that are stored in checkpoints.

    There is a set of tables for each circuit, or one set for all if no two circuits replace the same unit.

    Attributes:
        loss: lowest loss of each circuit; infinite before the first offer.
    """

    def __init__(self, replaced: Replaced, tables: TrainableConstants) -> None:
        super().__init__()
        self._replaced, self._slots = replaced, tables.slots
        for site, table in tables.by_site().items():
            self.register_buffer(site.key, table.detach().clone())
        n_circuits = len(next(iter(replaced.values())))
        self.loss = nn.Buffer(torch.full((n_circuits,), torch.inf, device=tables.device))

    def _tables(self) -> dict[Site, Tensor]:
        return {Site.of_key(key): table for key, table in self.named_buffers() if key != "loss"}

    @torch.no_grad()
    def offer(self, tables: TrainableConstants, loss: Float[Tensor, " circuit"]) -> None:
        """Keep the constants of every circuit whose loss is lower than before; a NaN never is."""
        offered = tables.by_site()
        for circuit in (loss.to(self.loss.device) < self.loss).nonzero().flatten().tolist():
            for site, best in self._tables().items():
                if site not in self._replaced:  # these circuits ablate nothing there
                    continue
                number = circuit if len(best) > 1 else 0
                taken = self._replaced[site][circuit].to(best.device).unsqueeze(-1)
                best[number] = torch.where(taken, offered[site][number], best[number])
            self.loss[circuit] = loss[circuit]

    def known(self) -> bool:
        """True once every circuit was offered constants with a finite loss."""
        return bool(torch.isfinite(self.loss).all())

    def sets(self) -> list[Constants]:
        """The constants of each circuit, or the one set that all circuits share."""
        tables = self._tables()
        n_sets = len(next(iter(tables.values())))
        return [constants.detach() for constants in unstacked(tables, self._slots, range(n_sets))]


def replaced_slots(level: Level, masks: Bool[Tensor, "circuit entry"], slots: Slots) -> Replaced:
    """Units that each circuit replaces, for each span that has its own slot."""
    replaced = level.replaced(masks)
    if slots.positions == 1:
        return replaced
    return {site: units.any(dim=1, keepdim=True) for site, units in replaced.items()}


def can_share_tables(replaced: Replaced) -> bool:
    """True if no two circuits replace the same unit, so that one set of tables can hold the constants of all."""
    return all(bool(units.sum(dim=0).le(1).all()) for units in replaced.values())
