"""A circuit: the components, or the edges, that are kept while all others are ablated."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from oa_train.artefacts import Artefact, load_artefact, save_artefact
from oa_train.errors import ArtefactError
from oa_train.models.selection import Components
from oa_train.models.graph import Graph
from oa_train.shapes import Bool, Float, Tensor


@dataclass(frozen=True)
class Circuit:
    """Kept attention heads and MLPs of one model, or kept edges between them.

    Attributes:
        parts: all components of the model, or the graph of all its edges.
        names: names of the kept ones, in mask order.
        scores: keep-probability of each of all parts, when the circuit was trained.
        provenance: model, task and run that the circuit comes from, plain data.
    """

    parts: Components | Graph
    names: tuple[str, ...]
    scores: Float[Tensor, " entry"] | None = field(default=None, compare=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        ordered = self.parts.kept(self.mask)
        object.__setattr__(self, "names", ordered)

    @classmethod
    def from_patterns(cls, parts: Components | Graph, patterns: Sequence[str]) -> "Circuit":
        """The circuit of all parts that match shell patterns (see `Components.select` and `Graph.select`)."""
        return cls(parts, parts.select(patterns))

    @classmethod
    def from_mask(
        cls,
        parts: Components | Graph,
        mask: Bool[Tensor, " entry"],
        scores: Float[Tensor, " entry"] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Circuit":
        """The circuit of all parts that a mask keeps."""
        return cls(parts, parts.kept(mask), scores, provenance or {})

    @property
    def mask(self) -> Bool[Tensor, " entry"]:
        """True for kept parts."""
        return self.parts.mask(self.names)

    @property
    def of_edges(self) -> bool:
        """Whether this is a circuit of edges."""
        return isinstance(self.parts, Graph)

    @property
    def what(self) -> str:
        """What its parts are called: `components` or `edges`."""
        return "edges" if self.of_edges else "components"

    @property
    def components(self) -> Components:
        """All components of the model."""
        return Components(self.parts.n_layers, self.parts.n_heads)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the kept components; of a circuit of edges those that an edge leads out of."""
        return self.parts.nodes(self.mask) if isinstance(self.parts, Graph) else self.names

    def __len__(self) -> int:
        return len(self.names)

    def counts(self) -> dict[str, int]:
        """Sizes for a results file."""
        counts = {"nodes": len(self.nodes), "nodes_total": len(self.components)}
        if not self.of_edges:
            return counts
        before = self.provenance.get("edges_before_removal", len(self))
        return counts | {"edges": len(self), "edges_total": len(self.parts), "edges_before_removal": before}

    def save(self, folder: str | Path) -> Path:
        """Write the circuit as an artefact folder."""
        header = {
            "edges" if self.of_edges else "nodes": list(self.names),
            **asdict(self.parts),
            "provenance": dict(self.provenance),
        }
        tensors = {"mask": self.mask} | ({} if self.scores is None else {"scores": self.scores})
        return save_artefact(folder, "circuit", Artefact(header, tensors))

    @classmethod
    def load(cls, folder: str | Path) -> "Circuit":
        """Read a circuit that `save` wrote.

        Raises:
            ArtefactError: the folder is missing, damaged, or holds something else.
        """
        artefact = load_artefact(folder, "circuit")
        try:
            header, mask = artefact.header, artefact.tensors["mask"]
            kind, names = (Graph, header["edges"]) if "edges" in header else (Components, header["nodes"])
            parts = kind(**{one.name: header[one.name] for one in fields(kind)})
            circuit = cls(parts, tuple(names), artefact.tensors.get("scores"), header["provenance"])
        except (KeyError, TypeError) as problem:
            raise ArtefactError(f"{folder} is not a circuit: {problem}") from problem
        if circuit.scores is not None and circuit.scores.shape != mask.shape:
            raise ArtefactError(f"{folder} contradicts itself: it has {len(mask)} {circuit.what} and other scores.")
        if not torch.equal(circuit.mask, mask):
            raise ArtefactError(f"{folder} contradicts itself: names and mask name different {circuit.what}.")
        return circuit


def jaccard(first: Circuit, second: Circuit) -> float:
    """Overlap of two circuits of one kind: shared parts over parts in either; 1 for two empty ones."""
    union = set(first.names) | set(second.names)
    return len(set(first.names) & set(second.names)) / len(union) if union else 1.0
