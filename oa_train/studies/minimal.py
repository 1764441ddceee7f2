"""Minimality and completeness of a circuit.

Minimal: each of its parts is needed, tested by removing them one at a time.
Complete: nothing outside it can do the task, tested by ablating all of its parts and keeping everything else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants, fit_passes
from oa_train.ablations.registry import ABLATION_KINDS
from oa_train.checks import check_at_least
from oa_train.circuits.random import random_circuits
from oa_train.errors import ConfigurationError
from oa_train.figures.minimality import worth_figure
from oa_train.figures.style import Figure
from oa_train.metrics.estimates import Estimate, written
from oa_train.progress import Stage
from oa_train.shapes import Bool, Tensor
from oa_train.studies.ablation_study import AblationStudy
from oa_train.studies.comparison_tables import measure_cells
from oa_train.studies.findings import listed
from oa_train.studies.study import (
    MOST_LISTED,
    Findings,
    Row,
    Table,
    differences,
    estimates,
    spoken,
    statistics_stages,
)

Verdict = Literal["needed", "undecided", "superfluous"]


@dataclass(frozen=True)
class MinimalSettings:
    """Settings of `minimal`.

    Attributes:
        refit: whether to refit the constants for the circuit without each part and, as a control, for the whole
            circuit. Otherwise the run's constants are used, which were not trained for the part's absence.
        tolerance: worth in nats that counts as negligible: a part is superfluous if the whole 95 % interval of its
            worth is at or below it.
        random_complements: number of random circuits of equal size that are ablated for comparison; 0 for none.
        fit: training of the constants of circuits without a part, and of complements.
    """

    refit: bool = False
    tolerance: float = 0.001
    random_complements: int = 5
    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=150, batch_size=16, evaluate_every=50))

    def __post_init__(self) -> None:
        check_at_least(0, tolerance=self.tolerance, random_complements=self.random_complements)


class Minimal(AblationStudy[MinimalSettings]):
    """Measures the worth of each part of a circuit, and evaluates the complement.

    The ablation is the one that the circuit was trained under. Parts that the training could not ablate are never
    removed; the complement keeps them too.

    Rows: the circuit without each of its parts, in descending order of worth, with the measures, their paired
    differences from the whole circuit (`x_minus_circuit`), a verdict, and the number of edges that dangle without it.

    Raises:
        ConfigurationError: the circuit has no parts that can be removed, a refit was asked for under an ablation
            without learned constants, or the circuit lacks the constants that its ablation needs.
        TaskError: the ablation needs counterfactuals and the task has none.
    """

    name = "minimal"
    Settings: ClassVar[type] = MinimalSettings
    asks_of = "one"

    def check(self) -> None:
        """Reject a circuit without removable parts, or without the constants that its ablation needs."""
        super().check()
        self.trained = self.circuits[0]
        self.kind = ABLATION_KINDS[self.trained.ablation]
        self.level, self.mask = self.trained.circuit.level, self.trained.circuit.mask
        self.removable = self.level.selected(self.trained.selected)
        if not (self.mask & self.removable).any():
            raise ConfigurationError(
                f"{self.trained.name} keeps none of the {self.level.parts} that it could leave out, so there is "
                "nothing to remove."
            )
        if self.settings.refit and not self.kind.learned:
            raise ConfigurationError(
                f"refit is true, but {self.trained.name} was trained under {self.kind.name} ablation, which has "
                "nothing to train. Leave refit out."
            )
        if self.kind.constant and self.trained.constants is None:
            raise ConfigurationError(
                f"{self.trained.name} has no constants, which {self.kind.name} ablation needs. Train some "
                "with fit_constants."
            )
        self.choose_kinds([self.kind.name])

    def plan(self) -> list[Stage]:
        """The circuits without a part, the clean model, and the complements."""
        settings, task, without = self.settings, self.task, 1 + int((self.mask & self.removable).sum())
        complements = 1 + settings.random_complements
        by_own_values = self.kind.learned or self.trained.constants is not None
        stages = [] if by_own_values else statistics_stages([self.kind.name], task)
        if settings.refit:
            stages.append(Stage("constants", fit_passes(without, settings.fit, task.n_validation, 0)))
        stages += [Stage("the parts", without * task.n_test), Stage("the clean model", task.n_test)]
        if self.kind.learned:
            stages += statistics_stages(["mean"], task)
            stages.append(Stage("constants", fit_passes(complements, settings.fit, task.n_validation, 1)))
        return [*stages, Stage("complements", complements * task.n_test)]

    def run(self) -> Findings:
        """Remove each part, then the superfluous ones together; then evaluate the complements."""
        whole, removals = self._without(
            [[entry] for entry in (self.mask & self.removable).nonzero().flatten().tolist()]
        )
        rows = sorted(removals, key=lambda row: -row["kl_minus_circuit"].mean)
        superfluous = [row for row in rows if row["verdict"] == "superfluous"]
        names = [row[self.level.part] for row in superfluous]
        together = self._together(names) if len(names) > 1 else None
        apart = sum(row["kl_minus_circuit"].mean for row in superfluous)
        figures = {"circuit": estimates(whole), "clean": estimates(self.clean_behaviour())}
        figures["complement"], *random = self._complements()
        return Findings(
            rows,
            metrics={f"{of}_{name}": value for of, measures in figures.items() for name, value in measures.items()},
            facts={
                "ablation": self.kind.name,
                "superfluous": {
                    "names": names,
                    "kl_minus_circuit_apart": apart,
                    **({} if together is None else {"together": together}),
                },
                "random_complements": random,
            },
            shown=[
                f"{self.trained.size} under {spoken(self.kind.name)} ablation",
                self._part_table(rows),
                *self._verdict_lines(rows, names, together, apart),
                _complement_table(figures, random),
            ],
            figures={"worth": partial(self._figure, rows, figures["circuit"]["kl"].mean)},
            circuit=self.trained.circuit.counts(),
            table="parts",
        )

    def _without(
        self, removed: Sequence[Sequence[int]], described: str = "circuits without a part"
    ) -> tuple[Behaviour, list[dict[str, Any]]]:
        """Behaviour of the whole circuit, then without each set of entries; and a row for each set."""
        masks = self.mask.repeat(1 + len(removed), 1)
        for row, entries in enumerate(removed, start=1):
            masks[row, list(entries)] = False
        masks = self.level.prune(masks)
        ablations = self._refitted(masks) if self.settings.refit else [self._own]
        behaviour = self.behaviour(self.level, masks, ablations, described, self.settings.fit.rows_per_run)
        return behaviour, [self._row(behaviour, masks, row, entries) for row, entries in enumerate(removed, start=1)]

    def _row(self, behaviour: Behaviour, masks: Tensor, row: int, entries: Sequence[int]) -> dict[str, Any]:
        dangling = masks[0] & ~masks[row]
        dangling[list(entries)] = False
        minus_circuit = differences(behaviour, behaviour, row, 0, "circuit")
        return {
            self.level.part: self.level.names[entries[0]],
            "dangling": int(dangling.sum()),
            "verdict": verdict(minus_circuit["kl_minus_circuit"], self.settings.tolerance),
            **estimates(behaviour, row),
            **minus_circuit,
        }

    def _together(self, names: Sequence[str]) -> dict[str, Any]:
        """Measures of the circuit without all of these parts."""
        together = [self.level.index(name) for name in names]
        _, (row,) = self._without([together], "the circuit without its superfluous parts")
        return {name: value for name, value in row.items() if name != self.level.part}

    def _complements(self) -> list[dict[str, Estimate]]:
        """Measures with the circuit's parts ablated, then those of each random circuit; everything else is kept."""
        drawn = random_circuits(
            self.level,
            len(self.trained.circuit),
            self.settings.random_complements,
            self.task.seed,
            self.trained.selected,
        )
        circuits = torch.stack([self.mask, *(circuit.mask for circuit in drawn)])
        masks = ~(circuits & self.removable)
        fit, ablations = self.settings.fit, [self._own]
        if self.kind.learned:
            ablations = [*self.fitted_constants(masks, fit, "complements")]
        behaviour = self.behaviour(self.level, masks, ablations, "complements", fit.rows_per_run)
        return [estimates(behaviour, row) for row in range(len(masks))]

    def _refitted(self, masks: Bool[Tensor, "circuit entry"]) -> list[Ablation]:
        """The circuit's constants, refitted for each circuit without a part."""
        assert self.trained.constants is not None
        fitted = fit_constants(
            self.model,
            self.task,
            self.level,
            masks,
            [self.trained.constants],
            self.settings.fit,
            track=self.track,
            description="fitting constants without a part",
        )
        return [*fitted.sets]

    @property
    def _own(self) -> Ablation:
        """The circuit's own ablation."""
        return self.kind.prepare(self.source) if self.trained.constants is None else self.trained.constants

    def _part_table(self, rows: Sequence[Row]) -> Table:
        first = f": the {MOST_LISTED} that are worth most" if len(rows) > MOST_LISTED else ""
        cells = [
            {
                "without": row[self.level.part],
                "KL minus\ncircuit": row["kl_minus_circuit"],
                "accuracy": f"{row['accuracy'].mean:.3f}",
                **({} if self.level.has_one_stream else {"dangling\nedges": row["dangling"]}),
                "verdict": row["verdict"],
            }
            for row in rows[:MOST_LISTED]
        ]
        return Table(f"The circuit without one of its {self.level.parts}{first}", cells)

    def _verdict_lines(
        self, rows: Sequence[Row], names: Sequence[str], together: Row | None, apart: float
    ) -> Iterator[str]:
        verdicts = [row["verdict"] for row in rows]
        counts = (f"{verdicts.count(kind)} {kind}" for kind in ("needed", "undecided", "superfluous"))
        yield f"{', '.join(counts)} of {len(rows)} {self.level.parts}"
        if names:
            yield f"superfluous: {listed(names, MOST_LISTED)}"
        if together is not None:
            yield (
                f"all {len(names)} of them together are worth {together['kl_minus_circuit']} nats; "
                f"the sum of their single worths is {written(apart)}"
            )

    def _figure(self, rows: Sequence[Row], kl: float) -> Figure:
        ablation = f"{spoken(self.kind.name)} ablation" + (", refitted" if self.settings.refit else "")
        return worth_figure(
            [row[self.level.part] for row in rows],
            [row["kl_minus_circuit"] for row in rows],
            [row["verdict"] for row in rows],
            self.settings.tolerance,
            f"{self.subject}: {self.trained.size}, KL {kl:.3g} nats ({ablation})",
        )


def verdict(increase: Estimate, tolerance: float) -> Verdict:
    """Judge a part by the increase in KL divergence without it, in nats.

    It is `needed` if the whole 95 % interval lies above the tolerance, `superfluous` if none of it does.
    """
    low, high = increase.ci95
    if low > tolerance:
        return "needed"
    return "superfluous" if high <= tolerance else "undecided"


def _complement_table(figures: Mapping[str, Row], random: Sequence[Row]) -> Table:
    named = {
        "nothing": figures["clean"],
        "all but the circuit": figures["circuit"],
        "the circuit": figures["complement"],
    }
    named |= {f"random circuit {number}": measures for number, measures in enumerate(random, start=1)}
    cells = [{"ablated": name, "KL": row["kl"], **measure_cells(row)} for name, row in named.items()]
    return Table("The circuit and its complement", cells)
