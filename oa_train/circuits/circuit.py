"""A circuit: the components that are kept while all others are ablated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from oa_train.artefacts import Artefact, load_artefact, save_artefact
from oa_train.errors import ArtefactError
from oa_train.models.components import Components
from oa_train.shapes import Bool, Float, Tensor


@dataclass(frozen=True)
class Circuit:
    """Kept attention heads and MLPs of one model.

    Attributes:
        components: all components of the model.
        nodes: names of the kept ones, in mask order.
        scores: keep-probability of every component, when the circuit was trained.
        provenance: model, task and run that the circuit comes from, plain data.
    """

    components: Components
    nodes: tuple[str, ...]
    scores: Float[Tensor, " component"] | None = field(default=None, compare=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        ordered = self.components.kept(self.mask)
        object.__setattr__(self, "nodes", ordered)

    @classmethod
    def from_patterns(cls, components: Components, patterns: Sequence[str]) -> "Circuit":
        """The circuit of all components that match shell patterns (see `Components.select`)."""
        return cls(components, components.select(patterns))

    @classmethod
    def from_mask(
        cls,
        components: Components,
        mask: Bool[Tensor, " component"],
        scores: Float[Tensor, " component"] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Circuit":
        """The circuit of all components that a mask keeps."""
        return cls(components, components.kept(mask), scores, provenance or {})

    @property
    def mask(self) -> Bool[Tensor, " component"]:
        """True for kept components."""
        return self.components.mask(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def counts(self) -> dict[str, int]:
        """Sizes for a results file."""
        return {"nodes": len(self), "nodes_total": len(self.components)}

    def save(self, folder: str | Path) -> Path:
        """Write the circuit as an artefact folder."""
        header = {
            "nodes": list(self.nodes),
            "n_layers": self.components.n_layers,
            "n_heads": self.components.n_heads,
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
            components = Components(header["n_layers"], header["n_heads"])
            circuit = cls(components, tuple(header["nodes"]), artefact.tensors.get("scores"), header["provenance"])
        except (KeyError, TypeError) as problem:
            raise ArtefactError(f"{folder} is not a circuit: {problem}") from problem
        if circuit.scores is not None and circuit.scores.shape != mask.shape:
            raise ArtefactError(f"{folder} contradicts itself: it has {len(mask)} components and other scores.")
        if not torch.equal(circuit.mask, mask):
            raise ArtefactError(f"{folder} contradicts itself: names and mask name different components.")
        return circuit


def jaccard(first: Circuit, second: Circuit) -> float:
    """Overlap of two circuits: shared components over components in either; 1 for two empty ones."""
    union = set(first.nodes) | set(second.nodes)
    return len(set(first.nodes) & set(second.nodes)) / len(union) if union else 1.0
