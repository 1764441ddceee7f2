"""Levels: what a circuit is made of, either units of sites (`Nodes`) or edges between components (`Graph`).

A mask has one number per entry of a level, and is never passed on without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from oa_train.errors import ConfigurationError, unknown_name
from oa_train.models.dictionaries import Dictionary
from oa_train.models.sites import Site
from oa_train.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """A number for each entry of a level, laid out as a table for a heat map; NaN where there is no entry."""

    table: Float[Tensor, "line column"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_axis: str
    column_axis: str


class Level(ABC):
    """The entries of a mask: their names and order, and what a mask over them means.

    Attributes:
        kind: name in configurations and files.
        part: what an entry is called.
        has_one_stream: whether all parts of a masked model read one residual stream.
    """

    kind: ClassVar[str]
    part: ClassVar[str]
    has_one_stream: ClassVar[bool]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Name of each mask entry."""

    @property
    @abstractmethod
    def sites(self) -> Mapping[Site, tuple[int, int]]:
        """Sites whose values can be replaced, in forward order, each with the number and the width of its units."""

    @property
    def spans(self) -> tuple[str | None, ...]:
        """Spans that entries are restricted to, in a fixed order; None for entries that hold at every token."""
        return (None,)

    @property
    def by_layer(self) -> Mapping[int, Dictionary]:
        """Sparse dictionaries whose features are units, by layer."""
        return {}

    @property
    def parts(self) -> str:
        """Plural of `part`."""
        return f"{self.part}s"

    @abstractmethod
    def __len__(self) -> int: ...

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def index(self, name: str) -> int:
        """Mask entry of a name.

        Raises:
            UnknownNameError: the level has no entry of that name.
        """
        if name not in self._indices:
            raise unknown_name(self.part, name, self.names)
        return self._indices[name]

    def mask(self, names: Sequence[str]) -> Bool[Tensor, " entry"]:
        """A mask that keeps the named entries and no others."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[[self.index(name) for name in names]] = True
        return mask

    def kept(self, mask: Bool[Tensor, " entry"]) -> tuple[str, ...]:
        """Names of the entries that a mask keeps, in mask order."""
        return tuple(self.names[number] for number in mask.nonzero().flatten().tolist())

    @abstractmethod
    def matched(self, pattern: str) -> Bool[Tensor, " entry"]:
        """Entries that a shell pattern matches.

        Raises:
            ConfigurationError: it matches none.
        """

    def selected(self, patterns: Sequence[str]) -> Bool[Tensor, " entry"]:
        """Entries that shell patterns select; a leading `!` deselects what earlier patterns selected.

        Raises:
            ConfigurationError: a pattern matches nothing.
        """
        chosen = torch.zeros(len(self), dtype=torch.bool)
        for pattern in patterns:
            matched = self.matched(pattern.removeprefix("!"))
            chosen = chosen & ~matched if pattern.startswith("!") else chosen | matched
        return chosen

    def select(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """Names that shell patterns select, in mask order; see `selected`."""
        return self.kept(self.selected(patterns))

    def prune(self, kept: Bool[Tensor, "row entry"]) -> Bool[Tensor, "row entry"]:
        """The mask without entries that the others leave without effect, separately in each row."""
        return kept

    def largest(self, scores: Float[Tensor, " entry"], size: int) -> Bool[Tensor, " entry"]:
        """The circuit of a given size with the largest scores; for edges see `within_budget`.

        Raises:
            ConfigurationError: there are fewer entries than that.
        """
        if not 0 <= size <= len(self):
            raise ConfigurationError(f"A circuit of {size} parts was asked for; this model has {len(self)}.")
        return self._largest(scores, size)

    def _largest(self, scores: Float[Tensor, " entry"], size: int) -> Bool[Tensor, " entry"]:
        """Ties go to the first in mask order."""
        mask = torch.zeros(len(scores), dtype=torch.bool)
        mask[scores.argsort(descending=True, stable=True)[:size]] = True
        return mask

    @abstractmethod
    def replaced(self, masks: Bool[Tensor, "circuit entry"]) -> dict[Site, Bool[Tensor, "circuit slot unit"]]:
        """Units whose value each circuit replaces anywhere; a slot for each of `spans`."""

    @abstractmethod
    def nodes(self, mask: Bool[Tensor, " entry"]) -> tuple[str, ...]:
        """Names of the nodes that take part in a circuit."""

    @abstractmethod
    def node_level(self, config: Any) -> "Level":
        """The nodes of a model that can be ablated one by one: this level, or the components between its edges."""

    @abstractmethod
    def counts(self, mask: Bool[Tensor, " entry"]) -> dict[str, int]:
        """Sizes of a circuit for a results file."""

    @property
    @abstractmethod
    def entry_kinds(self) -> tuple[tuple[str, ...], Int[Tensor, " entry"]]:
        """Kinds of site, and the number of each entry's kind among them; penalties may differ by it."""

    def entries_at_nodes(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], int] | None:
        """Pairs of an entry and a node that it touches, and the number of nodes; None where entries are nodes."""
        return None

    @abstractmethod
    def score_map(self, scores: Float[Tensor, " entry"]) -> ScoreMap:
        """Numbers of all entries as a table."""

    def arrows(self, mask: Bool[Tensor, " entry"]) -> list[tuple[str, str, str]] | None:
        """Edges between nodes in a drawing: source, reader, and `q`, `k`, `v` or nothing; None for boxes alone."""
        return None

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int] | None:
        """Layers, and heads of a layer, where a circuit can be drawn as boxes of heads and MLPs."""

    @abstractmethod
    def of_model(self, config: Any) -> "Level":
        """The same level in a model with this Hugging Face configuration."""

    @abstractmethod
    def header(self) -> dict[str, Any]:
        """Plain values from which `from_header` rebuilds this level."""

    @classmethod
    @abstractmethod
    def from_header(cls, header: Mapping[str, Any]) -> "Level":
        """The level that `header` describes.

        Raises:
            KeyError, TypeError: it does not describe one.
        """

    def identity(self) -> dict[str, Any]:
        """Values in which a checkpoint must agree with the level that it is loaded for, apart from the model."""
        return {"level": self.kind}

    @abstractmethod
    def describe(self) -> str:
        """Sizes of the model that the level is of, in words."""
