"""What is found out about a circuit's parts: what each is worth, and what the model does without all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from oa_train.ablations.registry import AblationKind
from oa_train.circuits.circuit import Circuit
from oa_train.metrics.estimates import Estimate

Verdict = Literal["needed", "undecided", "superfluous"]


def verdict(increase: Estimate, tolerance: float) -> Verdict:
    """What a rise in KL divergence says of what was taken out.

    Args:
        increase: KL divergence without it minus that with it, in nats.
        tolerance: nats that do not matter.

    Returns:
        `needed` where the whole 95 % interval lies above the tolerance, `superfluous` where none of it does.
    """
    low, high = increase.ci95
    if low > tolerance:
        return "needed"
    return "superfluous" if high <= tolerance else "undecided"


@dataclass(frozen=True)
class Removal:
    """A circuit without some of its parts.

    Attributes:
        names: the parts that were taken out.
        dangling: further edges that went with them, because they then led nowhere or came from nowhere.
        figures: each measure on the test prompts.
        difference: the same figures minus those of the whole circuit, prompt by prompt.
        verdict: whether the KL divergence has risen.
    """

    names: tuple[str, ...]
    dangling: int
    figures: Mapping[str, Estimate]
    difference: Mapping[str, Estimate]
    verdict: Verdict

    @property
    def increase(self) -> Estimate:
        """How far the KL divergence has risen, in nats."""
        return self.difference["kl"]

    def as_json(self) -> dict[str, Any]:
        """Figures for a results file."""
        return {
            "dangling": self.dangling,
            "verdict": self.verdict,
            **{name: value.as_json() for name, value in self.figures.items()},
            **{f"{name}_minus_circuit": value.as_json() for name, value in self.difference.items()},
        }


@dataclass(frozen=True)
class Minimality:
    """The answer of `minimal`.

    Attributes:
        circuit: what was asked about.
        ablation: what stands in for everything that is ablated.
        figures: each measure of the whole circuit.
        removals: the circuit without each of its parts, the part that is worth most first.
        together: the circuit without all parts that are superfluous one by one; None where fewer than two are.
        complement: each measure of the model with the circuit's parts ablated and all others kept.
        random_complements: the same for random circuits of equal size.
        clean: each measure of the model itself.
        folder: study folder.
    """

    circuit: Circuit
    ablation: AblationKind
    figures: Mapping[str, Estimate]
    removals: Sequence[Removal]
    together: Removal | None
    complement: Mapping[str, Estimate]
    random_complements: Sequence[Mapping[str, Estimate]]
    clean: Mapping[str, Estimate]
    folder: Path

    def of_verdict(self, wanted: Verdict) -> list[str]:
        """Names of the parts on which the verdict is this, the one that is worth most first."""
        return [removal.names[0] for removal in self.removals if removal.verdict == wanted]

    @property
    def apart(self) -> float:
        """Sum of what the superfluous parts are worth one by one, in nats; compare with what they are `together`."""
        return sum(one.increase.mean for one in self.removals if one.verdict == "superfluous")
