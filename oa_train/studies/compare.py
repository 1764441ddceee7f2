"""Ablations on the same prompts: of everything outside a circuit, of each component alone, for one run or several."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import Behaviour, circuit_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import KINDS, AblationKind, AblationSource, check_kind
from oa_train.artefacts import make_next_folder
from oa_train.circuits.random import random_circuits
from oa_train.errors import ConfigurationError
from oa_train.figures.agreement import agreement_figure
from oa_train.figures.comparison import Interval, Panel, comparison_figure
from oa_train.figures.style import save_figure
from oa_train.metrics.estimates import estimate, paired_difference
from oa_train.metrics.measures import MEASURES
from oa_train.models.levels import Level
from oa_train.models.loading import CausalLM, fingerprint
from oa_train.progress import Track, silent
from oa_train.shapes import Bool, Tensor
from oa_train.studies.agreement import jaccard_matrix, over_seeds
from oa_train.studies.comparison import Compared, Comparison, RandomCircuits
from oa_train.studies.results import results_document, write_results, write_table
from oa_train.studies.runs import TrainedCircuit
from oa_train.tasks.task import Task

# Components that are ablated alone unless others are asked for; of more only those that are.
MOST_ALONE = 100


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and how the constants for it are trained.

    Attributes:
        ablations: kinds of ablation; all that the task has prompts for when not given.
        components: a shell pattern, or a list of them, of the components that are ablated alone as well; an empty list
            for none. When not given, all of them if they are at most 100.
        positions: size of the tables of constants: 1 pools all positions, P tells P of them apart, `every` all
            positions that prompts have; as many as the runs tell apart when not given.
        fit: training of the constants of each component alone, and of the random circuits.
        circuit_fit: training of the constants of a run's circuit that has none, or none for this task, for KL
            divergence, or for a table of this size.
        random_circuits: circuits of each run's size that are drawn at random and given optimal constants; 0 for none.
            The run's own circuit is given the same training, so that they can be compared.
        seed: of the random circuits.
    """

    ablations: list[AblationKind] | None = None
    components: str | list[str] | None = None
    positions: int | Literal["every"] | None = None
    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=150, batch_size=16, evaluate_every=50))
    circuit_fit: RefitSettings = field(default_factory=RefitSettings)
    random_circuits: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.random_circuits < 0:
            raise ConfigurationError(f"random_circuits is {self.random_circuits}; expected 0 or more.")
        if isinstance(self.positions, int) and self.positions < 1:
            raise ConfigurationError(f"positions is {self.positions}; expected at least 1, or every.")
        if self.ablations is not None and not self.ablations:
            raise ConfigurationError(f"ablations is empty; name at least one of {', '.join(KINDS)}.")
        given = self.ablations or []
        for kind in given:
            check_kind("ablations", kind)
        if len(set(given)) < len(given):
            raise ConfigurationError(f"ablations names one of {', '.join(given)} twice.")


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
    its own constants when they were trained on this task, for KL divergence and for a table of this size, and is given
    some otherwise.

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
    random = study.random_circuits()
    kl = {row.run.name: row.figures["kl"].mean for row in rows if row.run and row.ablation == study.kinds[0]}
    written = make_next_folder(Path(folder) / "studies", "compare")
    compared = Compared(rows, random, jaccard_matrix(runs), over_seeds(runs, kl, study.kinds[0]), written)
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
        self.level = runs[0].circuit.level
        if any(run.circuit.level != self.level for run in runs):
            kinds = ", ".join(f"{run.name} of {len(run.circuit.level)} {run.circuit.level.parts}" for run in runs)
            raise ConfigurationError(f"These circuits are of different kinds: {kinds}. Compare those of one kind.")
        self.model = model
        self.task = task
        self.runs = runs
        self.settings = settings
        self.track = track
        self.batches = list(task.batches("test", task.n_test))
        self.kinds = self._kinds()
        # Of circuits of edges the components are ablated alone, not every edge.
        self.nodes = self.level.node_level(model.config)
        self.alone = self.nodes.select(self._alone_patterns())
        self.circuit_masks = torch.stack([run.circuit.mask for run in runs])
        self.alone_masks = torch.ones(len(self.alone), len(self.nodes), dtype=torch.bool)
        for row, name in enumerate(self.alone):
            self.alone_masks[row, self.nodes.index(name)] = False
        self.source = AblationSource(model, task, self.level, self._n_positions(), track)
        self._ablations: dict[AblationKind, Ablation] = {}

    def _alone_patterns(self) -> list[str]:
        components = self.settings.components
        if components is None:
            return ["*"] if len(self.nodes) <= MOST_ALONE else []
        return [components] if isinstance(components, str) else components

    def _kinds(self) -> list[AblationKind]:
        if self.settings.ablations is not None:
            return self.settings.ablations
        has_counterfactuals = self.batches[0].counterfactual_tokens is not None
        taking = [name for name, kind in KINDS.items() if not kind.restores]
        return [name for name in taking if has_counterfactuals or not KINDS[name].paired]

    def _n_positions(self) -> int:
        given = self.settings.positions
        if given == "every":
            return max(int(batch.lengths.max()) for batch in self.batches)
        return given or max((run.constants.n_positions for run in self.runs if run.constants is not None), default=1)

    def rows(self) -> list[Comparison]:
        """Every circuit and component under every ablation."""
        of_circuits = {
            kind: self._behaviour(kind, self.level, self.circuit_masks, self._circuit_constants, "circuits")
            for kind in self.kinds
        }
        rows = [
            _comparison("circuit", run, kind, of_circuits, index)
            for index, run in enumerate(self.runs)
            for kind in self.kinds
        ]
        if not self.alone:
            return rows
        of_alone = {
            kind: self._behaviour(kind, self.nodes, self.alone_masks, self._alone_constants, "components")
            for kind in self.kinds
        }
        return rows + [
            _comparison(name, None, kind, of_alone, index)
            for index, name in enumerate(self.alone)
            for kind in self.kinds
        ]

    def _behaviour(
        self,
        kind: AblationKind,
        level: Level,
        masks: Tensor,
        constants: Callable[[], Sequence[Constants]],
        what: str,
    ) -> Behaviour:
        ablations = constants() if KINDS[kind].learned else [self._prepared(kind)]
        shown = self.track(self.batches, f"evaluating {what} under {kind.replace('_', ' ')} ablation")
        return circuit_behaviour(self.model, shown, level, masks, ablations, self.settings.fit.rows_per_run)

    def _prepared(self, kind: AblationKind) -> Ablation:
        if kind not in self._ablations:
            self._ablations[kind] = KINDS[kind].prepare(self.source)
        return self._ablations[kind]

    def _circuit_constants(self) -> list[Constants]:
        """Each run's own optimal constants where they are for this; else trained, from its own or from the means."""
        ready = [self._has_constants(run) for run in self.runs]
        size = self.source.slots.positions
        starts = [
            run.constants.of_level(self.level).with_positions(size)
            if run.constants is not None and KINDS[run.ablation].learned
            else self.source.mean
            for run in self.runs
        ]
        lacking = [index for index, is_ready in enumerate(ready) if not is_ready]
        fitted = self._fitted(
            self.level,
            self.circuit_masks[lacking],
            [starts[index] for index in lacking],
            self.settings.circuit_fit,
            "fitting constants of circuits",
        )
        trained = dict(zip(lacking, fitted, strict=True))
        return [trained.get(index, start) for index, start in enumerate(starts)]

    def _has_constants(self, run: TrainedCircuit) -> bool:
        """Whether a run's constants were trained for what is measured here."""
        if run.constants is None or not KINDS[run.ablation].learned:
            return False
        provenance = run.constants.provenance
        task = {**self.task.describe(), "seed": None}
        return (
            run.constants.n_positions == self.source.slots.positions
            and {**provenance.get("task", task), "seed": None} == task
            and provenance.get("loss", "kl") == "kl"
        )

    def _alone_constants(self) -> list[Constants]:
        what = "fitting constants of components alone"
        return self._fitted(self.nodes, self.alone_masks, [self.source.mean], self.settings.fit, what)

    def _fitted(
        self,
        level: Level,
        masks: Bool[Tensor, "circuit entry"],
        starts: Sequence[Constants],
        settings: RefitSettings,
        description: str,
    ) -> list[Constants]:
        if not len(masks):
            return []
        fitted = fit_constants(
            self.model,
            self.task,
            level,
            masks,
            starts,
            settings,
            others=[self.source.mean, self.source.zero],
            track=self.track,
            description=description,
        )
        return fitted.sets

    def random_circuits(self) -> dict[int, RandomCircuits]:
        """Random circuits of each run's size, with optimal constants of their own."""
        if not self.settings.random_circuits or "optimal" not in self.kinds:
            return {}
        of_size = {len(run.circuit): run for run in reversed(self.runs)}
        return {size: self._random_circuits(run) for size, run in of_size.items()}

    def _random_circuits(self, run: TrainedCircuit) -> RandomCircuits:
        circuit = run.circuit
        among = circuit.provenance.get("selected", ["*"])
        drawn = random_circuits(self.level, len(circuit), self.settings.random_circuits, self.settings.seed, among)
        masks = torch.stack([circuit.mask, *(each.mask for each in drawn)])
        starts = [self.source.mean] * len(masks)
        sets = self._fitted(self.level, masks, starts, self.settings.fit, "fitting constants of random circuits")
        shown = self.track(self.batches, "evaluating random circuits")
        behaviour = circuit_behaviour(self.model, shown, self.level, masks, sets, self.settings.fit.rows_per_run)
        run_kl, *kl = behaviour.kl.mean(dim=1).tolist()
        return RandomCircuits(kl, run_kl)


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
        positions=study.source.slots.positions,
        runs=[
            {
                "name": run.name,
                "seed": run.seed,
                "trained_with": run.ablation,
                "nodes": list(run.circuit.nodes),
                **({} if study.level.has_one_stream else {"edges": list(run.circuit.names)}),
                **{f"n_{key}": value for key, value in run.circuit.counts().items()},
            }
            for run in study.runs
        ],
        random_circuits=[
            {"size": size, "kl": list(found.kl), "run_kl": found.run_kl, "percentile": found.percentile}
            for size, found in compared.random_circuits.items()
        ],
        fit=asdict(study.settings.fit),
        circuit_fit=asdict(study.settings.circuit_fit),
        jaccard=[list(row) for row in compared.jaccard],
        seeds=[dict(group) for group in compared.seeds],
    )
    write_results(compared.folder, document)
    write_table(compared.folder, "comparison", [row.as_json() for row in compared.rows])


def _draw(compared: Compared, study: _Study) -> None:
    figures = compared.folder / "figures"
    first, n_runs = study.runs[0], len(study.runs)
    model = first.circuit.provenance.get("model", "model")
    kept = f"{len(first.circuit)} of {len(study.level)} {study.level.parts} kept" if n_runs == 1 else f"{n_runs} runs"
    labels: dict[str, str] = {
        kind: kind.replace("_", " ") + ("" if KINDS[kind].total else " (not total)") for kind in study.kinds
    }
    panels = [
        Panel(
            "circuits: everything outside ablated",
            ["circuit"] if n_runs == 1 else [run.name for run in study.runs],
            _intervals(compared.circuits()),
            compared.random_circuits[len(first.circuit)].kl if n_runs == 1 and compared.random_circuits else (),
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
