"""Ablations on the same prompts: of everything outside a circuit, of each component alone, for one run or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.artefacts import make_next_folder
from oa_train.circuits.known import random_circuits
from oa_train.errors import ConfigurationError
from oa_train.figures.agreement import agreement_figure
from oa_train.figures.comparison import Interval, Panel, comparison_figure
from oa_train.figures.style import save_figure
from oa_train.interventions.evaluation import Behaviour, circuit_behaviour
from oa_train.interventions.kinds import KINDS, AblationKind, AblationSource, check_kind
from oa_train.metrics.measures import MEASURES
from oa_train.models.components import Components
from oa_train.models.families import Dimensions
from oa_train.models.loading import CausalLM, fingerprint
from oa_train.progress import Track, silent
from oa_train.shapes import Bool, Tensor
from oa_train.studies.agreement import jaccard_matrix, over_seeds
from oa_train.studies.results import results_document, write_results, write_table
from oa_train.studies.runs import TrainedCircuit
from oa_train.studies.statistics import Estimate, estimate, paired_difference
from oa_train.tasks.base import Task
from oa_train.training.refit import RefitSettings, fit_constants


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and how the constants for it are trained.

    Attributes:
        ablations: kinds of ablation; all that the task has prompts for when not given.
        components: a shell pattern, or a list of them, of the components that are ablated alone as well; an empty list
            for none.
        positions: size of the tables of constants: 1 pools all positions, P tells P of them apart, `every` all
            positions that prompts have; as many as the runs tell apart when not given.
        fit: training of the constants of each component alone, of the random circuits, and of circuits that have none
            of that size.
        random_circuits: circuits of each run's size that are drawn at random and given optimal constants; 0 for none.
        seed: of the random circuits.
    """

    ablations: list[AblationKind] | None = None
    components: str | list[str] = "*"
    positions: int | Literal["every"] | None = None
    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=150, batch_size=16, evaluate_every=50))
    random_circuits: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.random_circuits < 0:
            raise ConfigurationError(f"random_circuits is {self.random_circuits}; expected 0 or more.")
        if isinstance(self.positions, int) and self.positions < 1:
            raise ConfigurationError(f"positions is {self.positions}; expected at least 1, or every.")
        if self.ablations is not None and not self.ablations:
            raise ConfigurationError(f"ablations is empty; name at least one of {', '.join(KINDS)}.")
        for kind in self.ablations or ():
            check_kind("ablations", kind)


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
class Compared:
    """The answer of `compare`.

    Attributes:
        rows: a comparison for each run's circuit and for each component, under each ablation.
        random_kl: KL divergence of random circuits of each size under optimal constants, in nats.
        jaccard: overlap of every two runs' circuits.
        seeds: spread over the runs of each experiment that has several (see `studies.agreement.over_seeds`).
        folder: study folder.
    """

    rows: Sequence[Comparison]
    random_kl: Mapping[int, Sequence[float]]
    jaccard: Sequence[Sequence[float]]
    seeds: Sequence[Mapping[str, Any]]
    folder: Path

    def circuits(self) -> list[Comparison]:
        """The rows of the runs' circuits."""
        return [row for row in self.rows if row.run is not None]

    def components(self) -> list[Comparison]:
        """The rows of components ablated alone."""
        return [row for row in self.rows if row.run is None]


def compare(
    model: CausalLM,
    task: Task,
    runs: Sequence[TrainedCircuit],
    folder: str | Path,
    settings: CompareSettings | None = None,
    track: Track = silent,
) -> Compared:
    """Compare ablations on the same held-out prompts.

    Each run's circuit is tested under every ablation, whatever it was trained under. Under optimal ablation it keeps
    its own constants when it has some, and is given some when it has not.

    Args:
        model: frozen causal language model.
        task: where prompts come from.
        runs: one trained circuit or several, of this model.
        folder: run folder; results go to `studies/compare_K`.
        settings: what is compared, and how.
        track: progress.

    Raises:
        ConfigurationError: there is no run, or two have the same name.
        TaskError: an ablation was asked for that the task has no prompts for.
    """
    study = _Study(model, task, runs, settings or CompareSettings(), track)
    rows = study.rows()
    random_kl = study.random_divergences()
    kl = {row.run.name: row.figures["kl"].mean for row in rows if row.run and row.ablation == study.kinds[0]}
    written = make_next_folder(Path(folder) / "studies", "compare")
    compared = Compared(rows, random_kl, jaccard_matrix(runs), over_seeds(runs, kl), written)
    _write(compared, study, Path(folder))
    _draw(compared, study)
    return compared


class _Study:
    """What `compare` works on: circuits and components as masks, and the ablations of each."""

    def __init__(
        self, model: CausalLM, task: Task, runs: Sequence[TrainedCircuit], settings: CompareSettings, track: Track
    ) -> None:
        names = [run.name for run in runs]
        if not names or len(set(names)) < len(names):
            raise ConfigurationError(f"Expected one run or several with different names, not {names}.")
        self.model = model
        self.task = task
        self.runs = runs
        self.settings = settings
        self.track = track
        self.batches = list(task.batches("test", task.n_test))
        self.kinds = self._kinds()
        patterns = [settings.components] if isinstance(settings.components, str) else settings.components
        components = Components.of(Dimensions.of(model.config))
        self.alone = components.select(patterns)
        without = [~components.mask([name]) for name in self.alone]
        self.masks = torch.stack([*(run.circuit.mask for run in runs), *without])
        self.source = AblationSource(model, task, self._n_positions(), track)

    def _kinds(self) -> list[AblationKind]:
        if self.settings.ablations is not None:
            return self.settings.ablations
        has_counterfactuals = self.batches[0].counterfactual_tokens is not None
        return [name for name, kind in KINDS.items() if has_counterfactuals or not kind.paired]

    def _n_positions(self) -> int:
        given = self.settings.positions
        if given == "every":
            return max(int(batch.lengths.max()) for batch in self.batches)
        return given or max((run.constants.n_positions for run in self.runs if run.constants is not None), default=1)

    def rows(self) -> list[Comparison]:
        found = {kind: self._behaviour(kind) for kind in self.kinds}
        named = [("circuit", run) for run in self.runs] + [(name, None) for name in self.alone]
        return [
            _comparison(name, run, kind, found, index)
            for index, (name, run) in enumerate(named)
            for kind in self.kinds
        ]

    def _behaviour(self, kind: AblationKind) -> Behaviour:
        ablations = self._optimal() if KINDS[kind].learned else [KINDS[kind].prepare(self.source)]
        shown = self.track(self.batches, f"evaluating {kind.replace('_', ' ')} ablation")
        return circuit_behaviour(self.model, shown, self.masks, ablations, self.settings.fit.rows_per_run)

    def _optimal(self) -> Sequence[Ablation]:
        """Constants of every circuit and component: the run's own where they fit, else trained here."""
        own = [self._own_constants(run) for run in self.runs]
        size = self.source.n_positions
        ready = [constants is not None and constants.n_positions == size for constants in own]
        missing = torch.tensor([not one for one in ready] + [True] * len(self.alone))
        starts = [constants.with_positions(size) if constants is not None else self.source.mean for constants in own]
        fitted = self._fitted(
            self.masks[missing],
            [start for start, one in zip(starts, ready, strict=True) if not one]
            + [self.source.mean] * len(self.alone),
            "fitting constants of each component alone",
        )
        trained = iter(fitted)
        return [own[i] if i < len(own) and ready[i] else next(trained) for i in range(len(self.masks))]  # type: ignore[misc]

    @staticmethod
    def _own_constants(run: TrainedCircuit) -> Constants | None:
        return run.constants if KINDS[run.ablation].learned else None

    def _fitted(
        self, masks: Bool[Tensor, "circuit component"], starts: Sequence[Constants], what: str
    ) -> list[Constants]:
        if not len(masks):
            return []
        others = [self.source.mean, self.source.zero]
        fitted = fit_constants(
            self.model, self.task, masks, starts, self.settings.fit, others=others, track=self.track, description=what
        )
        return fitted.sets

    def random_divergences(self) -> dict[int, list[float]]:
        """KL divergence of random circuits of each run's size, with optimal constants of their own."""
        if not self.settings.random_circuits or "optimal" not in self.kinds:
            return {}
        of_size = {len(run.circuit): run for run in self.runs}
        return {size: self._random_divergences(run) for size, run in of_size.items()}

    def _random_divergences(self, run: TrainedCircuit) -> list[float]:
        circuit = run.circuit
        among = circuit.provenance.get("selected", circuit.components.names)
        drawn = random_circuits(
            circuit.components, len(circuit), self.settings.random_circuits, self.settings.seed, among
        )
        masks = torch.stack([one.mask for one in drawn])
        sets = self._fitted(masks, [self.source.mean] * len(masks), "fitting constants of random circuits")
        shown = self.track(self.batches, "evaluating random circuits")
        found = circuit_behaviour(self.model, shown, masks, sets, self.settings.fit.rows_per_run)
        kl: list[float] = found.kl.mean(dim=1).tolist()
        return kl


def _comparison(
    name: str,
    run: TrainedCircuit | None,
    kind: AblationKind,
    found: Mapping[AblationKind, Behaviour],
    index: int,
) -> Comparison:
    mine: dict[str, Tensor] = {measure: getattr(found[kind], measure)[index] for measure in MEASURES}
    differences = {}
    if "optimal" in found:
        differences = {
            measure: paired_difference(mine[measure], getattr(found["optimal"], measure)[index])
            for measure in MEASURES
        }
    return Comparison(
        component=name,
        run=run,
        ablation=kind,
        figures={measure: estimate(values) for measure, values in mine.items()},
        difference_to_optimal=differences,
    )


def _write(compared: Compared, study: _Study, folder: Path) -> None:
    first = study.runs[0].circuit
    provenance: dict[str, Any] = {"model": study.task.lm.name, "revision": study.task.lm.revision}
    provenance |= {"family": study.model.config.model_type, "fingerprint": fingerprint(study.model)}
    provenance |= {"task": study.task.describe(), "seed": study.settings.seed}
    document = results_document(
        "compare",
        folder,
        provenance,
        study.task.n_test,
        metrics={
            f"circuit_{row.ablation}_kl": row.figures["kl"].as_json()
            for row in compared.circuits()
            if row.run is study.runs[0]
        },
        rows=[row.as_json() for row in compared.rows],
        circuit=first.counts(),
        positions=study.source.n_positions,
        runs=[
            {
                "name": run.name,
                "seed": run.seed,
                "trained_with": run.ablation,
                "nodes": list(run.circuit.nodes),
                **{f"n_{key}": value for key, value in run.circuit.counts().items()},
            }
            for run in study.runs
        ],
        random_circuits=[{"size": size, "kl": kl} for size, kl in compared.random_kl.items()],
        jaccard=[list(row) for row in compared.jaccard],
        seeds=[dict(group) for group in compared.seeds],
    )
    write_results(compared.folder, document)
    write_table(compared.folder, "comparison", [row.as_json() for row in compared.rows])


def _draw(compared: Compared, study: _Study) -> None:
    figures = compared.folder / "figures"
    first, n_runs = study.runs[0], len(study.runs)
    model = first.circuit.provenance.get("model", "model")
    kept = f"{len(first.circuit)} of {len(first.circuit.components)} kept" if n_runs == 1 else f"{n_runs} runs"
    labels: dict[str, str] = {
        kind: kind.replace("_", " ") + ("" if KINDS[kind].total else " (not total)") for kind in study.kinds
    }
    panels = [
        Panel(
            "circuits: everything outside ablated",
            ["circuit"] if n_runs == 1 else [run.name for run in study.runs],
            _intervals(compared.circuits()),
            compared.random_kl.get(len(first.circuit), ()) if n_runs == 1 else (),
        ),
        Panel("one component ablated", list(study.alone), _intervals(compared.components())),
    ]
    figure = comparison_figure(panels, f"{model}, {study.task.name}: {kept}", labels)
    save_figure(figure, figures / "comparison.png")
    if n_runs > 1:
        rows = _intervals(compared.circuits())
        save_figure(
            agreement_figure(
                [f"{run.name}\n({run.ablation.replace('_', ' ')}, {len(run.circuit)})" for run in study.runs],
                {labels[kind]: [one.mean for one in rows[kind]] for kind in study.kinds},
                compared.jaccard,
            ),
            figures / "agreement.png",
        )


def _intervals(rows: Sequence[Comparison]) -> dict[str, list[Interval]]:
    drawn: dict[str, list[Interval]] = {}
    for row in rows:
        kl = row.figures["kl"]
        drawn.setdefault(row.ablation, []).append(Interval(kl.mean, *kl.ci95))
    return drawn
