"""Streaming means of units' values, independent of how the data are split.

Sums in float64 are kept with counts, so the order of batches changes the last bits at most.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from oa_train.ablations.constants import Constants, Slots
from oa_train.batches import Batch
from oa_train.engine.reading import read_values
from oa_train.engine.values import Values
from oa_train.models.frozen import CausalLM
from oa_train.models.levels import Level
from oa_train.models.sites import Site
from oa_train.shapes import Bool, Float, Int, Tensor


class StreamingMeans:
    """Sums of units' values in each slot, over all tokens so far.

    Attributes:
        sums: sums by site, [slot, unit, width], float64.
        counts: number of tokens summed in each slot, [slot].
    """

    def __init__(self, slots: Slots | None = None) -> None:
        self.slots = slots or Slots()
        self.sums: dict[Site, Float[Tensor, "slot unit width"]] = {}
        self.counts: Int[Tensor, " slot"] = torch.zeros(len(self.slots), dtype=torch.long)

    def add(
        self,
        values: Values,
        batch: Batch,
        counted: Bool[Tensor, "batch position"],
        of: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        """Add a function `of` the values of a batch at the `counted` tokens, computed in float64."""
        n_slots = len(self.slots)
        for inside, slot in self._tokens_of_slots(batch, counted):
            self.counts += torch.bincount(slot, minlength=n_slots).cpu()
            for site, tensor in values.items():
                summed = _summed(tensor[inside], slot, n_slots, of)
                self.sums[site] = self.sums[site] + summed if site in self.sums else summed

    def _tokens_of_slots(
        self, batch: Batch, counted: Bool[Tensor, "batch position"]
    ) -> Iterable[tuple[Bool[Tensor, "batch position"], Int[Tensor, " token"]]]:
        """The tokens that are summed, and the slot of each; a token in several spans occurs once for each span."""
        if self.slots.positions > 1:
            yield counted, batch.positions[counted].clamp(max=self.slots.positions - 1)
            return
        for number, span in enumerate(self.slots.spans):
            inside = counted if span is None else counted & batch.layout.span(span)
            yield inside, torch.full((int(inside.sum()),), number, device=inside.device)

    def means(self) -> Constants:
        """Means as constants; a position without tokens takes the mean of the nearest earlier one, or 0."""
        return self._constants(self._means())

    def spread(self, squares: "StreamingMeans") -> Constants:
        """Standard deviations as constants, from the sums of the squares of the same values.

        They are differences of large numbers; float64 keeps them accurate even for a mean a thousand times as large.
        """
        means, of_squares = self._means(), squares._means()
        return self._constants(
            {site: (of_squares[site] - mean.square()).clamp(min=0).sqrt() for site, mean in means.items()}
        )

    def _constants(self, tables: Mapping[Site, Tensor]) -> Constants:
        return Constants({site: table.float() for site, table in tables.items()}, self.slots)

    def _means(self) -> dict[Site, Float[Tensor, "slot unit width"]]:
        if not self.counts.sum():
            raise ValueError("No token was counted, so there is no mean.")
        counts = self.counts.clamp(min=1).view(-1, 1, 1)
        nearest = torch.arange(len(self.slots))
        if self.slots.positions > 1:
            nearest = torch.where(self.counts > 0, nearest, 0).cummax(dim=0).values
        return {site: (summed / counts)[nearest] for site, summed in self.sums.items()}


def _summed(
    tokens: Float[Tensor, "token unit width"],
    slot: Int[Tensor, " token"],
    n_slots: int,
    of: Callable[[Tensor], Tensor],
) -> Float[Tensor, "slot unit width"]:
    device = "cpu" if tokens.device.type == "mps" else tokens.device  # MPS has no float64
    sums = torch.zeros(n_slots, *tokens.shape[1:], dtype=torch.float64, device=device)
    return sums.index_add_(0, slot.to(device), of(tokens.to(device).double())).cpu()


def value_sums(
    model: CausalLM,
    batches: Iterable[Batch],
    level: Level,
    slots: Slots,
    of: Callable[[Tensor], Tensor] = lambda value: value,
) -> StreamingMeans:
    """Sums of a function of the units' values over the tokens of prompts, on any device.

    Protected tokens are left out, and tokens after the last scored position, which cannot influence the prediction.
    """
    sums = StreamingMeans(slots)
    for batch in batches:
        shown = batch.to(model.device)
        columns = torch.arange(shown.tokens.shape[1], device=model.device)
        counted = shown.attention_mask & (columns <= shown.scored[:, -1:]) & ~shown.protected
        sums.add(read_values(model, shown, level), shown, counted, of)
    return sums
