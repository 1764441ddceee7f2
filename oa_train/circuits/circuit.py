"""A circuit: the entries of a level that are kept while all others are ablated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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
from oa_train.errors import ArtefactError, OaTrainError, UnknownNameError, nearest_names
from oa_train.models.graph import Graph
from oa_train.models.levels import Level
from oa_train.models.parts import Dimensions
from oa_train.models.selection import Nodes
from oa_train.models.sites import SITE_KINDS
from oa_train.shapes import Bool, Float, Tensor

# Levels by name, and the header schemas of their circuits.
LEVELS: dict[str, type[Level]] = {level.kind: level for level in (Nodes, Graph)}
_FIELDS: Schema = {"level": str, "names": [str], "provenance": PROVENANCE}
_HEADERS: dict[str, Schema] = {
    Nodes.kind: _FIELDS
    | {
        "dimensions": dict.fromkeys(("n_layers", "n_heads", "d_head", "d_model", "d_mlp"), SIZE),
        "sites": [str],
        "spanned": [str],
        "dictionaries": [{"path": str, "site": str, "centres_input": bool, "fingerprint": str}],
    },
    Graph.kind: _FIELDS
    | dict.fromkeys(("n_layers", "n_heads", "n_kv_heads"), SIZE)
    | dict.fromkeys(("d_head", "d_model"), range(SIZE.stop))
    | {"parallel": bool},
}


@dataclass(frozen=True)
class Circuit:
    """The entries of one model's level that are kept.

    Attributes:
        level: the level of the mask, units or edges.
        names: names of the kept entries, in mask order.
        scores: keep-probability of every entry, if the circuit was trained.
        provenance: model, task and run that the circuit comes from, as plain data.
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

    @classmethod
    def from_file(cls, folder: str | Path, level: Level, names: Sequence[str], content: Artefact) -> "Circuit":
        """The circuit with these names, and mask and scores from an artefact; `folder` is for messages.

        Raises:
            ArtefactError: the names, the mask and the scores contradict each other or the level.
        """
        tensors = content.tensors
        if unknown := tensors.keys() - {"mask", "scores"}:
            raise ArtefactError(f"{folder} is damaged: it has a tensor {min(unknown)!r}; expected mask and scores.")
        check_tensor(folder, "mask", tensors.get("mask"), [len(level)], torch.bool)
        if "scores" in tensors:
            check_tensor(folder, "scores", tensors["scores"], [len(level)], *FLOATS)
        try:
            circuit = cls(level, tuple(names), tensors.get("scores"), content.header["provenance"])
        except UnknownNameError as problem:
            raise ArtefactError(f"{folder} is not a circuit: {problem}") from problem
        if not torch.equal(circuit.mask, tensors["mask"]):
            raise ArtefactError(f"{folder} contradicts itself: names and mask name different {level.parts}.")
        return circuit

    @property
    def mask(self) -> Bool[Tensor, " entry"]:
        """True for kept entries."""
        return self.level.mask(self.names)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes in the circuit; in a circuit of edges, those with an outgoing edge."""
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
        header, kind = artefact.header, str(artefact.header.get("level"))
        if kind not in LEVELS:
            raise ArtefactError(f"{folder} is a circuit of the level {kind[:60]!r}. {nearest_names(kind, LEVELS)}")
        check_header(folder, "circuit", header, _HEADERS[kind])
        mask = artefact.tensors.get("mask")
        n_entries = 0 if mask is None else mask.numel()
        try:
            if _fewest_entries(header) > n_entries:  # checked before memory is spent on names
                raise ArtefactError(f"it contradicts itself: a mask of {n_entries} entries is too short for its sizes")
            level = LEVELS[kind].from_header(header)
        except (KeyError, OaTrainError) as problem:
            raise ArtefactError(f"The circuit {folder} cannot be used: {problem}") from problem
        return cls.from_file(folder, level, header["names"], artefact)


def _fewest_entries(header: Mapping[str, Any]) -> int:
    """Lower bound on the number of entries of a level with these sizes: its units, or one edge for each reader."""
    if header["level"] == Graph.kind:
        return int(header["n_layers"] * (header["n_heads"] + 2 * header["n_kv_heads"] + 1))
    sizes, kinds = Dimensions(**header["dimensions"]), (SITE_KINDS[name] for name in header["sites"])
    return sum(len(kind.layers(sizes)) * kind.shape(sizes)[0] for kind in kinds)


def jaccard(first: Circuit, second: Circuit) -> float:
    """Overlap of two circuits of one level: shared entries divided by entries in either; 1 for two empty circuits."""
    union = set(first.names) | set(second.names)
    return len(set(first.names) & set(second.names)) / len(union) if union else 1.0
