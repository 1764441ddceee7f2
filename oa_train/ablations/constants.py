"""Constants: replacements that do not depend on the prompt.

Zero, mean and optimal ablation differ only in the values of the constants. Those of an optimal ablation are trained to
keep the ablated model as close as possible to the clean one (Li & Janson, 2024).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oa_train.ablations.base import Ablation, ValuesOf
from oa_train.artefacts import (
    FLOATS,
    PROVENANCE,
    SIZE,
    Artefact,
    Schema,
    check_header,
    check_tensor,
    load_artefact,
    save_artefact,
)
from oa_train.batches import Batch
from oa_train.engine.values import SlotOf, Values
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.models.levels import Level
from oa_train.models.sites import Site
from oa_train.shapes import Float, Int, Tensor

Tables = Mapping[Site, Float[Tensor, "slot unit width"]]
_HEADER: Schema = {"positions": SIZE, "spans": [(str, None)], "provenance": PROVENANCE}


@dataclass(frozen=True)
class Slots:
    """Assignment of tokens to slots; the tokens of a slot share a constant.

    Attributes:
        positions: 1 pools all positions. P > 1 gives a slot to each of the positions 0 to P - 2, and one to all later
            positions; positions are counted from a prompt's first real token.
        spans: spans of the entries that are ablated, each with a slot if positions are pooled; None denotes entries
            that apply at every token.
    """

    positions: int = 1
    spans: tuple[str | None, ...] = (None,)

    def __len__(self) -> int:
        return self.positions if self.positions > 1 else len(self.spans)

    def of_tokens(self, positions: Int[Tensor, "row position"]) -> dict[str | None, SlotOf]:
        """Slot of each token, for each span."""
        if self.positions > 1:
            by_position = positions.clamp(max=self.positions - 1)
            return dict.fromkeys(self.spans, by_position)
        return {span: number for number, span in enumerate(self.spans)}


@dataclass(frozen=True, eq=False)
class Constants(Ablation):
    """A constant for each unit of some sites and each slot.

    Attributes:
        tables: constants by site.
        slots: which tokens share a constant.
        provenance: model, task and run that they come from, as plain data; `bos_token_id` is the token that is
            protected at the start of a prompt.
    """

    tables: Tables
    slots: Slots = Slots()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def zeros(cls, level: Level, positions: int = 1) -> "Constants":
        """Zero ablation: every replacement is zero, so an MLP loses its output bias as well."""
        slots = Slots(positions, level.spans)
        return cls({site: torch.zeros(len(slots), *shape) for site, shape in level.sites.items()}, slots)

    @property
    def n_positions(self) -> int:
        """Number of positions with their own slots; 1 if they are pooled."""
        return self.slots.positions

    def with_positions(self, positions: int) -> "Constants":
        """The same constants for more positions; the additional ones copy the last one.

        Raises:
            ConfigurationError: `positions` is smaller than `n_positions`, or there are several spans.
        """
        if positions == self.n_positions:
            return self
        if positions < self.n_positions:
            raise ConfigurationError(
                f"These constants tell {self.n_positions} positions apart and cannot be put into a table of "
                f"{positions}; give at least as many."
            )
        if len(self.slots.spans) > 1:
            raise ConfigurationError("Constants of several spans cannot also differ by position.")
        further = positions - self.n_positions
        wider = self.mapped(lambda table: torch.cat([table, *[table[-1:]] * further]))
        return replace(wider, slots=replace(self.slots, positions=positions))

    def to(self, device: torch.device | str) -> "Constants":
        """Copy to a device."""
        return self.mapped(lambda table: table.to(device))

    def detach(self) -> "Constants":
        """A copy without gradients, which later training does not change."""
        return self.mapped(lambda table: table.detach().clone())

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Constants":
        """A copy with a function applied to every table."""
        return replace(self, tables={site: function(table) for site, table in self.tables.items()})

    def of_level(self, level: Level) -> "Constants":
        """The constants of a level's sites alone; raises `ArtefactError` if some are missing, see `check_fits`."""
        self.check_fits(level)
        return replace(self, tables={site: self.tables[site] for site in level.sites})

    def check_fits(self, level: Level) -> None:
        """Check that every unit of a level has a constant of its width; raises `ArtefactError` if not."""
        for site, shape in level.sites.items():
            if site not in self.tables:
                raise ArtefactError(f"The constants lack the site {site.key}; they have {_listed(self.tables)}.")
            if self.tables[site].shape[1:] != shape:
                raise ArtefactError(
                    f"The constants of {site.key} are for {_sizes(self.tables[site].shape[1:])}; this model has "
                    f"{_sizes(shape)} there."
                )
        lacking = [str(span) for span in level.spans if span not in self.slots.spans]
        if lacking:
            raise ArtefactError(f"The constants were not made for the spans {', '.join(lacking)} of the circuit.")

    def save(self, folder: str | Path) -> Path:
        """Write the constants as an artefact folder."""
        header = {
            "positions": self.slots.positions,
            "spans": list(self.slots.spans),
            "provenance": dict(self.provenance),
        }
        tensors = {site.key: table for site, table in self.tables.items()}
        return save_artefact(folder, "constants", Artefact(header, tensors))

    @classmethod
    def load(cls, folder: str | Path) -> "Constants":
        """Read constants that `save` wrote.

        Raises:
            ArtefactError: the folder is missing, damaged, of an older version, or holds something else.
        """
        artefact = load_artefact(folder, "constants")
        header = artefact.header
        check_header(folder, "constants", header, _HEADER)
        slots = Slots(header["positions"], tuple(header["spans"]))
        tables = {Site.of_key(key): table for key, table in artefact.tensors.items()}
        if not tables or any(table.dim() != 3 or len(table) != len(slots) for table in tables.values()):
            raise ArtefactError(f"{folder} contradicts itself: its tables are not of {len(slots)} slots.")
        for key, table in artefact.tensors.items():
            check_tensor(folder, key, table, [None] * 3, *FLOATS)
        return cls(tables, slots, header["provenance"])

    def replacements(self, batch: Batch, values_of: ValuesOf | None = None) -> Values:
        """The constants at the tokens of a batch, with gradients to them; no model is run."""
        del values_of
        return self.at(batch.positions)

    def at(self, positions: Int[Tensor, "row position"]) -> Values:
        """The constants at tokens of these positions, with gradients to them."""
        tables = {site: table.unsqueeze(0) for site, table in self.tables.items()}
        return Values(tables, self.slots.of_tokens(positions))


def unstacked(
    tables: Mapping[Site, Float[Tensor, "circuit slot unit width"]], slots: Slots, numbers: Iterable[int]
) -> list[Constants]:
    """The constants of circuits with these numbers, which share gradients and memory with the tables."""
    return [Constants({site: table[number] for site, table in tables.items()}, slots) for number in numbers]


def _sizes(shape: Sequence[int]) -> str:
    return f"{shape[0]} units of width {shape[1]}"


def _listed(sites: Mapping[Site, Any]) -> str:
    names = [site.key for site in sites]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


class TrainableConstants(nn.Module):
    """Optimal-ablation constants as float32 parameters, for one circuit or for several at once.

    Args:
        starts: initial constants of each circuit.
        trained: sites whose constants are trained; all by default.
    """

    def __init__(self, starts: Sequence[Constants], trained: Sequence[Site] | None = None) -> None:
        super().__init__()
        self.slots = starts[0].slots
        self.tables = nn.ParameterDict(
            {
                site.key: nn.Parameter(
                    torch.stack([start.tables[site] for start in starts]).detach().float(),
                    requires_grad=trained is None or site in trained,
                )
                for site in starts[0].tables
            }
        )

    def __len__(self) -> int:
        return len(next(iter(self.tables.values())))

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        table: Tensor = next(iter(self.tables.values()))
        return table.device

    def by_site(self) -> dict[Site, nn.Parameter]:
        """Tables of all circuits by site: [circuit, slot, unit, width]."""
        return {Site.of_key(key): table for key, table in self.tables.items()}

    def sets(self, circuits: Iterable[int] | None = None) -> list[Constants]:
        """The constants of each circuit, of some, or the set that all share, with gradients to the parameters."""
        numbers = range(len(self)) if circuits is None or len(self) == 1 else circuits
        return unstacked(self.by_site(), self.slots, numbers)

    @torch.no_grad()
    def load(self, constants: Constants) -> None:
        """Overwrite the constants of every circuit in place."""
        for site, table in self.by_site().items():
            table.copy_(constants.tables[site])
