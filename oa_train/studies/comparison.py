"""What a comparison of ablations finds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oa_train.ablations.registry import KINDS, AblationKind
from oa_train.metrics.estimates import Estimate
from oa_train.studies.runs import TrainedCircuit


@dataclass(frozen=True)
class Comparison:
    """Figures under one ablation.

    Attributes:
        component: `circuit` when everything outside a circuit is ablated, else the one component that is.
        run: the run that the circuit is of; None for a component.
        ablation: what replaces the ablated components.
        figures: each measure on the test prompts.
        difference_to_optimal: the same figures minus those under optimal ablation, prompt by prompt; empty when
            that was not asked for.
    """

    component: str
    run: TrainedCircuit | None
    ablation: AblationKind
    figures: Mapping[str, Estimate]
    difference_to_optimal: Mapping[str, Estimate]

    def as_json(self) -> dict[str, Any]:
        """The row of a results file."""
        run = {"run": self.run.name, "trained_with": self.run.ablation} if self.run is not None else {}
        return {
            "component": self.component,
            **run,
            "ablation": self.ablation,
            "total": KINDS[self.ablation].total,
            **{name: value.as_json() for name, value in self.figures.items()},
            **{f"{name}_minus_optimal": value.as_json() for name, value in self.difference_to_optimal.items()},
        }


@dataclass(frozen=True)
class RandomCircuits:
    """Random circuits of one size, and a run's circuit of that size, after the same training of their constants.

    Attributes:
        kl: KL divergence of each random circuit in nats.
        run_kl: KL divergence of the run's circuit, its constants being trained from the means like theirs.
    """

    kl: Sequence[float]
    run_kl: float

    @property
    def percentile(self) -> float:
        """Percentage of the random circuits that do as well as the run's circuit, or better."""
        return 100 * sum(kl <= self.run_kl for kl in self.kl) / len(self.kl)


@dataclass(frozen=True)
class Compared:
    """The answer of `compare`.

    Attributes:
        rows: a comparison for each run's circuit and for each component, under each ablation.
        random_circuits: how random circuits of each size do under optimal constants.
        jaccard: overlap of every two runs' circuits.
        seeds: spread over the runs of each experiment that has several (see `studies.agreement.over_seeds`).
        folder: study folder.
    """

    rows: Sequence[Comparison]
    random_circuits: Mapping[int, RandomCircuits]
    jaccard: Sequence[Sequence[float]]
    seeds: Sequence[Mapping[str, Any]]
    folder: Path

    def circuits(self) -> list[Comparison]:
        """The rows of the runs' circuits."""
        return [row for row in self.rows if row.run is not None]

    def components(self) -> list[Comparison]:
        """The rows of components ablated alone."""
        return [row for row in self.rows if row.run is None]
