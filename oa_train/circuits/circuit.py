"""A circuit: the entries of a level that are kept while all others are ablated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from oa_train.artefacts import Artefact, load_artefact, save_artefact
from oa_train.errors import ArtefactError, OaTrainError
from oa_train.models.graph import Graph
from oa_train.models.levels import Level
from oa_train.models.selection import Nodes
from oa_train.shapes import Bool, Float, Tensor

# What circuits are made of, by name.
LEVELS: dict[str, type[Level]] = {level.kind: level for level in (Nodes, Graph)}


@dataclass(frozen=True)
class Circuit:
    """Kept units of one model, or kept edges between its components.

    Attributes:
        level: all entries that there are.
        names: names of the kept ones, in mask order.
        scores: keep-probability of every entry, when the circuit was trained.
        provenance: model, task and run that the circuit comes from, plain data.
    """

    level: Level
    names: tuple[str, ...]
    scores: Float[Tensor, " entry"] | None = field(default=None, compare=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", self.level.kept(self.mask))

    @classmethod
    def from_patterns(cls, level: Level, patterns: Sequence[str]) -> "Circuit":
        """The circuit of all entries that shell patterns select (see `Level.selected`)."""
        return cls(level, level.select(patterns))

    @classmethod
    def from_mask(
        cls,
        level: Level,
        mask: Bool[Tensor, " entry"],
        scores: Float[Tensor, " entry"] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Circuit":
        """The circuit of all entries that a mask keeps."""
        return cls(level, level.kept(mask), scores, provenance or {})

    @property
    def mask(self) -> Bool[Tensor, " entry"]:
        """True for kept entries."""
        return self.level.mask(self.names)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that take part; of a circuit of edges those that an edge leads out of."""
        return self.level.nodes(self.mask)

    def __len__(self) -> int:
        return len(self.names)

    def counts(self) -> dict[str, int]:
        """Sizes for a results file."""
        pruned = self.provenance.get("edges_before_removal")
        return self.level.counts(self.mask) | ({} if pruned is None else {"edges_before_removal": pruned})

    def save(self, folder: str | Path) -> Path:
        """Write the circuit as an artefact folder."""
        header = {"names": list(self.names), **self.level.header(), "provenance": dict(self.provenance)}
        tensors = {"mask": self.mask} | ({} if self.scores is None else {"scores": self.scores})
        return save_artefact(folder, "circuit", Artefact(header, tensors))

    @classmethod
    def load(cls, folder: str | Path) -> "Circuit":
        """Read a circuit that `save` wrote.

        Raises:
            ArtefactError: the folder is missing, damaged, of an older version, or holds something else.
        """
        artefact = load_artefact(folder, "circuit")
        try:
            header, mask = artefact.header, artefact.tensors["mask"]
            level = LEVELS[header["level"]].from_header(header)
            circuit = cls(level, tuple(header["names"]), artefact.tensors.get("scores"), header["provenance"])
        except ArtefactError:
            raise
        except (KeyError, TypeError, OaTrainError) as problem:
            raise ArtefactError(f"{folder} is not a circuit: {problem}") from problem
        if circuit.scores is not None and circuit.scores.shape != mask.shape:
            raise ArtefactError(f"{folder} contradicts itself: it has {len(mask)} {level.parts} and other scores.")
        if not torch.equal(circuit.mask, mask):
            raise ArtefactError(f"{folder} contradicts itself: names and mask name different {level.parts}.")
        return circuit


def jaccard(first: Circuit, second: Circuit) -> float:
    """Overlap of two circuits of one level: shared entries over entries in either; 1 for two empty ones."""
    union = set(first.names) | set(second.names)
    return len(set(first.names) & set(second.names)) / len(union) if union else 1.0
