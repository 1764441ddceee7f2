"""Levels: the entries of a mask, which are either units of sites (`Nodes`) or edges between components (`Graph`).

A mask has a number for each entry of its level, and is always passed along with that level.
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
    """Scores of a level's entries as a table for a heat map; NaN where there is no entry."""

    table: Float[Tensor, "line column"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_axis: str
    column_axis: str


class Level(ABC):
    """The entries of a mask: their names and order, and the meaning of a mask over them.

    Attributes:
        kind: name of the level in configurations and files.
        part: noun for an entry in messages.
        has_one_stream: True if all readers of a masked model share one residual stream.
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
        """Sites whose values can be replaced, in forward order, with number and width of their units."""

    @property
    def spans(self) -> tuple[str | None, ...]:
        """Spans that entries are restricted to, in a fixed order; None for entries that apply at every token."""
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
            ConfigurationError: the pattern matches nothing.
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
        """A mask without the entries that have no effect given the others, such as dangling edges, row by row."""
        return kept

    def largest(self, scores: Float[Tensor, " entry"], size: int) -> Bool[Tensor, " entry"]:
        """The circuit of a given size with the highest scores; for edges see `within_budget`.

        Raises:
            ConfigurationError: the level has fewer than `size` entries.
        """
        if not 0 <= size <= len(self):
            raise ConfigurationError(f"A circuit of {size} parts was asked for; this model has {len(self)}.")
        return self._largest(scores, size)

    def _largest(self, scores: Float[Tensor, " entry"], size: int) -> Bool[Tensor, " entry"]:
        """`largest` without its check; ties go to the first entry in mask order."""
        mask = torch.zeros(len(scores), dtype=torch.bool)
        mask[scores.argsort(descending=True, stable=True)[:size]] = True
        return mask

    @abstractmethod
    def replaced(self, masks: Bool[Tensor, "circuit entry"]) -> dict[Site, Bool[Tensor, "circuit slot unit"]]:
        """Units whose value each circuit replaces at some token, with a slot for each of `spans`."""

    @abstractmethod
    def nodes(self, mask: Bool[Tensor, " entry"]) -> tuple[str, ...]:
        """Names of the nodes in a circuit."""

    @abstractmethod
    def node_level(self, config: Any) -> "Level":
        """The level whose nodes can be ablated one by one: this one, or the components that its edges connect."""

    @abstractmethod
    def counts(self, mask: Bool[Tensor, " entry"]) -> dict[str, int]:
        """Sizes of a circuit for a results file."""

    @property
    @abstractmethod
    def entry_kinds(self) -> tuple[tuple[str, ...], Int[Tensor, " entry"]]:
        """Kinds of site, and for each entry the index of its kind; penalty weights may differ by kind."""

    def entries_at_nodes(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], int] | None:
        """Pairs of an entry and a node at one of its ends, and the number of nodes; None if entries are nodes."""
        return None

    @abstractmethod
    def score_map(self, scores: Float[Tensor, " entry"]) -> ScoreMap:
        """Scores of all entries as a table."""

    def arrows(self, mask: Bool[Tensor, " entry"]) -> list[tuple[str, str, str]] | None:
        """Arrows of a drawing: source, reader, and `q`, `k`, `v` or an empty string; None if only boxes are drawn."""
        return None

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int] | None:
        """Number of layers, and of heads in a layer; None if circuits do not consist of whole heads and MLPs."""

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
            KeyError, TypeError: the header does not describe a level.
        """

    def identity(self) -> dict[str, Any]:
        """Values in which a checkpoint must agree with the level for which it is loaded, apart from the model."""
        return {"level": self.kind}

    @abstractmethod
    def describe(self) -> str:
        """Sizes of the level's model, in words."""
