"""Values of units: the replacements that constants, means, noise and other runs supply."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from oa_train.models.sites import Site
from oa_train.shapes import Float, Int, Tensor

# Slot of each token, or one slot for all tokens.
SlotOf = int | Int[Tensor, "row position"]


@dataclass(frozen=True, eq=False)
class Values(Mapping[Site, Tensor]):
    """A value for every unit of some sites, in each slot and row.

    A token takes its value from a slot: there is one slot for all tokens (pooled constants), or one for each position,
    each span, or each column of a batch.

    Attributes:
        tensors: values by site; a first dimension of size 1 applies to all rows, a second of size 1 to all tokens.
        slots: slot of each token, for entries that apply at every token (None) and for those of each span. If a span
            is missing here, the slot is the token's column, or the only one.
    """

    tensors: Mapping[Site, Float[Tensor, "row_or_1 slot unit width"]]
    slots: Mapping[str | None, SlotOf] = field(default_factory=dict)

    def __getitem__(self, site: Site) -> Tensor:
        return self.tensors[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def at(self, site: Site, span: str | None = None) -> Float[Tensor, "row_or_1 position_or_1 unit width"]:
        """Values of a site at the tokens of a batch, with gradients; values of a span are valid inside it only."""
        values, slot = self.tensors[site], self.slots.get(span)
        if slot is None or values.shape[1] == 1:
            return values
        if isinstance(slot, int):
            return values[:, slot : slot + 1]
        rows = torch.arange(len(values), device=values.device).unsqueeze(1)
        laid_out: Tensor = values[rows if len(values) > 1 else 0, slot]
        return laid_out

    def repeat(self, times: int) -> "Values":
        """Tile like `Batch.repeat`: row `s * B + b` is row `b`; values that apply to all rows are unchanged."""
        if times == 1:
            return self
        return self._by_row(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    def only(self, sites: Iterable[Site]) -> "Values":
        """The values of some sites."""
        return Values({site: self.tensors[site] for site in sites}, self.slots)

    def rows(self, numbers: Int[Tensor, " row"]) -> "Values":
        """The values of some rows; values that apply to all rows are unchanged."""
        return self._by_row(lambda tensor: tensor[numbers])

    def _by_row(self, function: Callable[[Tensor], Tensor]) -> "Values":
        slots = {span: slot if isinstance(slot, int) else function(slot) for span, slot in self.slots.items()}
        return Values({site: v if len(v) == 1 else function(v) for site, v in self.items()}, slots)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Values":
        """Apply a function to the values of each site."""
        return Values({site: function(tensor) for site, tensor in self.items()}, self.slots)


def side_by_side(sets: Sequence[Values], n_rows: int) -> Values:
    """Values for copies of a batch of `n_rows` rows: each copy has its own set, and all sets have the same sites."""
    first = sets[0]
    if all(_is_one_slot(values) and values.slots == first.slots for values in sets):
        slots = first.slots  # tables of pooled constants stay as small as they are
        laid_out = [values.tensors for values in sets]
    else:
        spans = list(dict.fromkeys(span for values in sets for span in values.slots or (None,)))
        width = max(values.at(site, span).shape[1] for values in sets for site in first for span in spans)
        columns = torch.arange(width, device=next(iter(first.values())).device).expand(len(sets) * n_rows, -1)
        slots = {span: number * width + columns for number, span in enumerate(spans)} if len(spans) > 1 else {}
        laid_out = [
            {site: torch.cat([values.at(site, span).expand(-1, width, -1, -1) for span in spans], 1) for site in first}
            for values in sets
        ]
    return Values(
        {site: torch.cat([tables[site].expand(n_rows, -1, -1, -1) for tables in laid_out]) for site in first}, slots
    )


def _is_one_slot(values: Values) -> bool:
    return all(isinstance(slot, int) for slot in values.slots.values()) and (
        bool(values.slots) or all(tensor.shape[1] == 1 for tensor in values.values())
    )
