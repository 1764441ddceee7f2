"""Finished runs: what a fit has left in its folder."""

from dataclasses import dataclass
from pathlib import Path

from oa_train.ablations.constants import Constants
from oa_train.ablations.registry import KINDS, AblationKind
from oa_train.circuits.circuit import Circuit
from oa_train.studies.results import run_name


@dataclass(frozen=True, eq=False)
class TrainedCircuit:
    """A circuit, and the constants that were made for it.

    Attributes:
        name: what tables and figures call it; experiment and version for a run.
        circuit: the circuit.
        constants: what replaces the other components; None when the circuit was trained under an ablation that is not
            one by constants.
    """

    name: str
    circuit: Circuit
    constants: Constants | None = None

    @classmethod
    def load(cls, run: str | Path) -> "TrainedCircuit":
        """Read the artefacts of a run folder.

        Raises:
            ArtefactError: the run was not finished, or its files are damaged.
        """
        folder = Path(run)
        circuit = Circuit.load(folder / "circuit")
        kind = KINDS[circuit.provenance.get("ablation", "optimal")]
        constants = Constants.load(folder / "constants") if kind.constant else None
        return cls(run_name(folder), circuit, constants)

    @property
    def ablation(self) -> AblationKind:
        """The kind of ablation under which it was trained; optimal where nothing says otherwise."""
        constants = self.constants.provenance if self.constants is not None else {}
        kind: AblationKind = self.circuit.provenance.get("ablation") or constants.get("ablation") or "optimal"
        return kind

    @property
    def seed(self) -> int | None:
        """Seed of the training; None for a circuit written by hand."""
        seed: int | None = self.circuit.provenance.get("seed")
        return seed
