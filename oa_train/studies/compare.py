"""Ablations compared on the same prompts: of everything outside a circuit, and of each component alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import RefitSettings, fit_passes
from oa_train.ablations.registry import ABLATION_KINDS, AblationName
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.checks import check_at_least
from oa_train.errors import ConfigurationError
from oa_train.figures.comparison import Control, Panel, comparison_figure
from oa_train.figures.overlap import agreement_figure
from oa_train.figures.style import Figure
from oa_train.progress import Stage
from oa_train.shapes import Bool, Tensor
from oa_train.studies.ablation_study import AblationStudy
from oa_train.studies.comparison_tables import (
    alone_cells,
    circuit_cells,
    described_run,
    kl_by_ablation,
    label,
    most_listed,
    seeds_line,
)
from oa_train.studies.options import check_ablations, check_positions, n_positions, patterns_of
from oa_train.studies.overlap import jaccard_matrix, over_seeds
from oa_train.studies.random_control import beside_random_circuits, random_line, random_stages
from oa_train.studies.study import MOST_LISTED, Findings, Row, Table, differences, estimates, spoken, statistics_stages

# Up to this many components, all are ablated alone by default; beyond it, only those asked for.
MOST_ALONE = 64


@dataclass(frozen=True)
class CompareSettings:
    """Settings of `compare`.

    Attributes:
        ablations: kinds of ablation; by default all for which the task has prompts.
        components: shell pattern, or a list of patterns, of the components that are also ablated alone; an empty list
            for none. By default all components if there are at most 64.
        positions: number of positions with their own constants: 1 pools all positions, `every` is as many as the
            prompts have; by default that of the runs.
        fit: training of the constants for each component ablated alone.
        circuit_fit: training of constants for the circuit of a run that has none trained on this task, for KL
            divergence and with this number of positions.
        random_circuits: number of random circuits of each run's size whose constants are trained; 0 for none. As a
            control, the constants of the run's own circuit get the same training.
        random_fit: training of the constants of random circuits and of that control.
        random_prompts: number of test prompts on which random circuits are evaluated, at most `n_test`.
    """

    ablations: list[AblationName] | None = None
    components: str | list[str] | None = None
    positions: int | Literal["every"] | None = None
    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=150, batch_size=16, evaluate_every=50))
    circuit_fit: RefitSettings = field(default_factory=RefitSettings)
    random_circuits: int = 20
    random_fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=30, batch_size=8, evaluate_every=30))
    random_prompts: int = 128

    def __post_init__(self) -> None:
        check_at_least(0, random_circuits=self.random_circuits)
        check_at_least(1, random_prompts=self.random_prompts)
        check_positions(self.positions)
        check_ablations(self.ablations)


class Compare(AblationStudy[CompareSettings]):
    """Compares ablations on the same held-out prompts.

    Each circuit is evaluated under every ablation, not only the one it was trained under. Under optimal ablation it
    keeps its own constants if they were trained on this task, for KL divergence and with this number of positions;
    otherwise new ones are trained.

    Rows: one for each circuit and ablation (`component` is "circuit"), then one for each component and ablation, each
    with the measures and their paired differences from optimal ablation (`x_minus_optimal`).

    Raises:
        ConfigurationError: two circuits have the same name or are over different levels, or a pattern matches nothing.
        TaskError: the task has no prompts for an ablation that was asked for.
    """

    name = "compare"
    Settings: ClassVar[type] = CompareSettings
    asks_of = "several"

    def check(self) -> None:
        """Reject circuits of different levels, and patterns that match nothing."""
        super().check()
        self.level = self.circuits[0].circuit.level
        if any(run.circuit.level != self.level for run in self.circuits):
            levels = [(run.name, run.circuit.level) for run in self.circuits]
            kinds = ", ".join(f"{name} of {len(level)} {level.parts}" for name, level in levels)
            raise ConfigurationError(f"These circuits are of different kinds: {kinds}. Compare those of one kind.")
        self.choose_kinds(self.settings.ablations)
        # For edge circuits, components rather than single edges are ablated alone.
        self.nodes = self.level.node_level(self.model.config)
        components = self.settings.components
        if components is None:
            components = ["*"] if len(self.nodes) <= MOST_ALONE else []
        self.alone = self.nodes.select(patterns_of(components))

    def plan(self) -> list[Stage]:
        """The clean model and the statistics; circuits and components under each ablation; random circuits."""
        settings, task, n_alone = self.settings, self.task, len(self.alone)
        stages = [Stage("the clean model", task.n_test), *statistics_stages(self.kinds, task)]
        lacking = [run for run in self.circuits if not self._has_constants(run)]
        n_others = 1 if all(run.constants is None for run in lacking) else 2
        passes = fit_passes(len(lacking), settings.circuit_fit, task.n_validation, n_others)
        stages += self.stages_under_each(len(self.circuits), passes)
        if n_alone:
            stages += self.stages_under_each(n_alone, fit_passes(n_alone, settings.fit, task.n_validation, 1))
        for _ in self._controlled:
            stages += random_stages(settings.random_circuits, settings.random_fit, self._n_random_prompts, task)
        return stages

    def run(self) -> Findings:
        """Evaluate circuits, components and random circuits under each ablation."""
        settings = self.settings
        self.clean_behaviour()
        circuit_rows, alone_rows = self._circuit_rows(), self._alone_rows()
        drawn = [
            beside_random_circuits(self, run, settings.random_circuits, settings.random_fit, self._n_random_prompts)
            for run in self._controlled
        ]
        rows, first, overlaps = [*circuit_rows, *alone_rows], self.circuits[0], jaccard_matrix(self.circuits)
        kl = {row["run"]: row["kl"].mean for row in circuit_rows if row["ablation"] == self.kinds[0]}
        seeds = over_seeds(self.circuits, kl, self.kinds[0])
        figures: dict[str, Callable[[], Figure | None]] = {
            "comparison": partial(self._figure, circuit_rows, alone_rows, drawn)
        }
        if len(self.circuits) > 1:
            figures["agreement"] = partial(self._agreement_figure, circuit_rows, overlaps)
        return Findings(
            rows,
            metrics={f"circuit_{row['ablation']}_kl": row["kl"] for row in circuit_rows if row["run"] == first.name},
            facts={
                "positions": self.positions,
                "left_out": self.left_out,
                "runs": [described_run(run) for run in self.circuits],
                "random_circuits": drawn,
                "jaccard": overlaps,
                "seeds": seeds,
            },
            shown=[*self._shown(circuit_rows, alone_rows, drawn, overlaps), *map(seeds_line, seeds)],
            figures=figures,
            circuit=first.circuit.counts(),
            table="comparison",
        )

    @property
    def positions(self) -> int:
        """Number of positions with their own constants."""
        trained = (run.constants.n_positions for run in self.circuits if run.constants is not None)
        own = max(trained, default=1)
        return n_positions(self.settings.positions or own, self.batches)

    @property
    def _controlled(self) -> list[TrainedCircuit]:
        """The first run of each circuit size, to compare with random circuits."""
        if not self.settings.random_circuits or "optimal" not in self.kinds:
            return []
        return list({len(run.circuit): run for run in reversed(self.circuits)}.values())

    @property
    def _n_random_prompts(self) -> int:
        return min(self.settings.random_prompts, self.task.n_test)

    def _circuit_rows(self) -> list[Row]:
        masks = torch.stack([run.circuit.mask for run in self.circuits])
        constants = partial(self._circuit_constants, masks)
        behaviours = self.under_each(masks, constants, "circuits", self.settings.fit.rows_per_run)
        return [
            {"component": "circuit", "run": run.name, "trained_with": run.ablation} | row
            for index, run in enumerate(self.circuits)
            for row in _rows(behaviours, index)
        ]

    def _alone_rows(self) -> list[Row]:
        if not self.alone:
            return []
        masks = torch.stack([~self.nodes.mask([name]) for name in self.alone])
        fit = self.settings.fit
        constants = partial(self.fitted_constants, masks, fit, "components alone", level=self.nodes)
        behaviours = self.under_each(masks, constants, "components", fit.rows_per_run, self.nodes)
        return [{"component": name} | row for index, name in enumerate(self.alone) for row in _rows(behaviours, index)]

    def _circuit_constants(self, masks: Bool[Tensor, "circuit entry"]) -> list[Constants]:
        """Optimal constants of each run: its own if they apply, else trained from its own or from the means."""
        chosen = [self._start(run) for run in self.circuits]
        lacking = [index for index, run in enumerate(self.circuits) if not self._has_constants(run)]
        starts, fit = [chosen[index] for index in lacking], self.settings.circuit_fit
        fitted = self.fitted_constants(masks[lacking], fit, "circuits", starts=starts)
        for index, constants in zip(lacking, fitted, strict=True):
            chosen[index] = constants
        return chosen

    def _start(self, run: TrainedCircuit) -> Constants:
        if run.constants is None or not ABLATION_KINDS[run.ablation].learned:
            return self.source.mean
        return run.constants.of_level(self.level).with_positions(self.positions)

    def _has_constants(self, run: TrainedCircuit) -> bool:
        """True if a run's constants were learned on this task, for KL divergence and with this number of positions."""
        if run.constants is None or not ABLATION_KINDS[run.ablation].learned:
            return False
        provenance, task = run.constants.provenance, {**self.task.describe(), "seed": None}
        return (
            run.constants.n_positions == self.positions
            and {**provenance.get("task", task), "seed": None} == task
            and provenance.get("loss", "kl") == "kl"
        )

    def _shown(
        self,
        circuit_rows: Sequence[Row],
        alone_rows: Sequence[Row],
        drawn: Sequence[Mapping[str, Any]],
        overlaps: Sequence[Sequence[float]],
    ) -> Iterator[Table | str]:
        for run in self.circuits:
            title = f"{run.name}: {run.size}, {run.criterion}, trained with {spoken(run.ablation)} ablation\n"
            title += "KL divergence in nats with everything else ablated, mean ± 95 % interval"
            yield Table(title, circuit_cells([row for row in circuit_rows if row["run"] == run.name]))
        if alone_rows:
            title = most_listed("KL divergence in nats with one component ablated", len(self.alone))
            yield Table(title, alone_cells(alone_rows, len(self.kinds))[:MOST_LISTED])
        elif self.settings.components is None:
            yield (
                f"No component was ablated alone: the model has {len(self.nodes)}, and by default this is done for at "
                f"most {MOST_ALONE}. --compare.components 'a10.*' selects some, '*' all."
            )
        yield from self.left_out_lines()
        yield from (random_line(control, self.level.parts) for control in drawn)
        if len(self.circuits) > 1:
            numbered = [f"{number}  {run.name}" for number, run in enumerate(self.circuits, start=1)]
            yield Table(
                "Jaccard overlap of the circuits",
                [
                    {"": name} | {str(number): f"{value:.2f}" for number, value in enumerate(row, start=1)}
                    for name, row in zip(numbered, overlaps, strict=True)
                ],
            )

    def _figure(
        self, circuit_rows: Sequence[Row], alone_rows: Sequence[Row], drawn: Sequence[Mapping[str, Any]]
    ) -> Figure:
        first, several = self.circuits[0], len(self.circuits) > 1
        kept = f"{len(self.circuits)} runs" if several else f"{first.size} kept"
        panels = [
            Panel(
                "circuits: everything outside ablated",
                [run.name for run in self.circuits] if several else ["circuit"],
                kl_by_ablation(circuit_rows),
            ),
            Panel("one component ablated", list(self.alone), kl_by_ablation(alone_rows), ranked=True),
        ]
        controls = [Control(f"{control['size']:,} kept", control["run_kl"], control["kl"]) for control in drawn]
        labels = {kind: label(kind) for kind in self.kinds}
        return comparison_figure(panels, f"{self.subject}: {kept}", labels, controls)

    def _agreement_figure(self, circuit_rows: Sequence[Row], overlaps: Sequence[Sequence[float]]) -> Figure:
        names = [f"{run.name}\n({spoken(run.ablation)}, {len(run.circuit)})" for run in self.circuits]
        kl = {label(kind): [value.mean for value in values] for kind, values in kl_by_ablation(circuit_rows).items()}
        return agreement_figure(names, kl, overlaps)


def _rows(behaviours: Mapping[AblationName, Behaviour], index: int) -> Iterator[dict[str, Any]]:
    optimal = behaviours.get("optimal")
    for kind, behaviour in behaviours.items():
        row = {"ablation": kind, "total": ABLATION_KINDS[kind].total, **estimates(behaviour, index)}
        yield row if optimal is None else row | differences(behaviour, optimal, index, index, "optimal")
