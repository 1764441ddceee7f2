"""A circuit together with the constants that were trained for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from oa_train.ablations.constants import Constants
from oa_train.ablations.context import check_belongs
from oa_train.ablations.registry import ABLATION_KINDS, AblationName
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ArtefactError, nearest_names
from oa_train.models.frozen import CausalLM


@dataclass(frozen=True, eq=False)
class TrainedCircuit:
    """A circuit and the constants of all units outside it.

    Attributes:
        name: name in tables and figures; experiment and version for the circuit of a run.
        circuit: the circuit.
        constants: replacements of the ablated units; None for an ablation without constants.
        noun: what messages call it.
    """

    noun: ClassVar[str] = "circuit"

    name: str
    circuit: Circuit
    constants: Constants | None = None

    @classmethod
    def load(cls, folder: str | Path) -> "TrainedCircuit":
        """Read `circuit/` and `constants/` of a run folder, or of one of its circuits (`RUN/front/N`).

        Raises:
            ArtefactError: the run was not finished, or its files are damaged.
        """
        folder = Path(folder)
        circuit = Circuit.load(folder / "circuit")
        name = circuit.provenance.get("ablation", "optimal")
        if name not in ABLATION_KINDS:
            raise ArtefactError(
                f"{folder} was trained under the ablation {name!r}. {nearest_names(name, ABLATION_KINDS)}"
            )
        kind = ABLATION_KINDS[name]
        return cls(run_name(folder), circuit, Constants.load(folder / "constants") if kind.constant else None)

    def check_belongs(self, model: CausalLM) -> None:
        """Raise an `ArtefactError` if the circuit belongs to another model."""
        check_belongs(model, self.circuit, self.constants)

    @property
    def fingerprint(self) -> str | None:
        """Digest of the model's weights; None for a circuit written by hand."""
        fingerprint: str | None = self.circuit.provenance.get("fingerprint")
        return fingerprint

    def save_circuit(self, folder: Path) -> None:
        """Write `circuit/` into a folder."""
        self.circuit.save(folder / "circuit")

    def save_constants(self, folder: Path) -> None:
        """Write `constants/` into a folder, if there are any."""
        if self.constants is not None:
            self.constants.save(folder / "constants")

    @property
    def ablation(self) -> AblationName:
        """Ablation under which the circuit was trained; optimal by default."""
        constants = self.constants.provenance if self.constants is not None else {}
        kind: AblationName = self.circuit.provenance.get("ablation") or constants.get("ablation") or "optimal"
        return kind

    @property
    def seed(self) -> int | None:
        """Seed of the training; None for a circuit written by hand."""
        seed: int | None = self.circuit.provenance.get("seed")
        return seed

    @property
    def training(self) -> dict[str, Any]:
        """Settings of the training; empty for a circuit written by hand."""
        return dict(self.circuit.provenance.get("training", {}))

    @property
    def positions(self) -> int:
        """Number of positions that the constants distinguish."""
        if self.constants is not None:
            return self.constants.n_positions
        positions: int = self.training.get("positions", 1)
        return positions

    @property
    def selected(self) -> list[str]:
        """Shell patterns of the entries that the training was free to ablate."""
        patterns: list[str] = self.circuit.provenance.get("selected", ["*"])
        return patterns

    @property
    def criterion(self) -> str:
        """Rule by which the entries were chosen, for titles."""
        circuit, threshold = self.circuit, self.training.get("threshold", 0.5)
        if circuit.scores is None:
            return "given"
        above = circuit.scores > threshold
        if bool((above == circuit.mask).all()):
            return f"keep-probability above {threshold:g}"
        without = "" if circuit.level.has_one_stream else f", without dangling {circuit.level.parts}"
        if not bool((circuit.mask & ~above).any()) and without:
            return f"keep-probability above {threshold:g}{without}"
        return f"those of the highest keep-probability ({int(above.sum()):,} are above {threshold:g}){without}"

    @property
    def size(self) -> str:
        """Size for titles: "7 of 15 components"."""
        return f"{len(self.circuit):,} of {len(self.circuit.level):,} {self.circuit.level.parts}"


def run_name(folder: str | Path) -> str:
    """Name of a run in tables and figures: experiment/version.

    It is followed by front/N for one of its circuits, and by studies/<name>_<K> for a circuit that a study found.
    """
    path = Path(folder).absolute()
    own = "/".join(path.parts[-2:])
    is_part = path.parent.name in ("front", "studies") and not path.name.startswith("version_")
    return f"{run_name(path.parent.parent)}/{own}" if is_part else own
