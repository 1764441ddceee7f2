"""The end of a fit: constants are refitted for the discrete circuits, which are evaluated and written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants, fit_passes
from oa_train.ablations.registry import ABLATION_KINDS, AblationName, AblationSource
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.checks import check_at_least, check_choice
from oa_train.circuits.circuit import Circuit
from oa_train.figures.fronts import front_figure
from oa_train.figures.style import Figure
from oa_train.metrics.estimates import Estimate, written
from oa_train.models.frozen import CausalLM
from oa_train.progress import Stage, Track, silent
from oa_train.studies.ablation_study import AblationStudy
from oa_train.studies.findings import listed
from oa_train.studies.run_folder import circuit_folders
from oa_train.studies.study import Findings, Row, Table, estimates, spoken, statistics_stages
from oa_train.tasks.task import Task
from oa_train.training.mask_figures import circuit_picture, score_picture

RefitStart = Literal["trained", "mean", "both"]

# For a level with more entries, only the kept ones are listed.
MOST_ROWS = 2000

# Maximum number of a circuit's entries that are named on the terminal.
MOST_NAMED = 10

# Several circuits are also evaluated under these ablations, to compare with their own.
REFERENCES: tuple[AblationName, ...] = ("mean", "zero")

# Options of the module that determine the size of a circuit.
PRICES = ("penalty_weight", "node_penalty", "target_size", "target_warmup")


@dataclass(frozen=True)
class FinishSettings:
    """Settings of the end of a fit.

    Attributes:
        refit: training of the constants for the discrete circuit.
        refit_start: initial constants of the refit: those `trained` with the masks, the `mean`, or `both`, of which
            the better by validation loss is kept. Starting from the means can end in a worse optimum.
        size: number of entries of the circuit: those with the highest keep-probability, without dangling edges. By
            default the module's target size, or without one all entries above its threshold.
    """

    refit: RefitSettings = field(default_factory=RefitSettings)
    refit_start: RefitStart = "trained"
    size: int | None = None

    def __post_init__(self) -> None:
        check_choice("finish.refit_start", self.refit_start, get_args(RefitStart))
        check_at_least(1, **{"finish.size": self.size})


@dataclass(frozen=True, eq=False)
class Finished:
    """Finished circuits with their final constants, and the findings of their evaluation."""

    circuits: list[TrainedCircuit]
    findings: Findings


def finish(
    model: CausalLM,
    task: Task,
    circuits: Sequence[TrainedCircuit],
    run: str | Path,
    settings: FinishSettings | None = None,
    track: Track = silent,
) -> Finished:
    """Refit the constants of trained circuits, and write circuits, constants and their evaluation to a run folder.

    A single circuit is written to `circuit/` and `constants/`, several to `front/N/`; the evaluation goes to
    `studies/fit_K/`. `circuits` are from `CircuitModule.trained_circuits` and were trained on the task.
    """
    settings, folders = settings or FinishSettings(), circuit_folders(Path(run), len(circuits))
    study = Evaluate(model, task, circuits, settings, track)
    study.announce([*study.refit_stages(), *study.plan()])
    # The circuits are written before the refit, so that an interruption loses only the refit.
    for trained, folder in zip(circuits, folders, strict=True):
        trained.save_circuit(folder)
    study.refit()
    for trained, folder in zip(study.circuits, folders, strict=True):
        trained.save_constants(folder)
    findings = study.run_in(run)
    return Finished(study.circuits, findings)


class Evaluate(AblationStudy[FinishSettings]):
    """Evaluates circuits under their own ablation on the test prompts.

    Rows: for one circuit, its entries with their keep-probabilities; for several, each circuit under its own ablation
    and under mean and zero ablation.
    """

    name = "fit"
    Settings: ClassVar[type] = FinishSettings
    asks_of = "several"

    def check(self) -> None:
        """Store the ablation and the level, which all circuits of a training run share."""
        super().check()
        self.ablation, self.level = self.circuits[0].ablation, self.circuits[0].circuit.level
        others = [kind for kind in REFERENCES if kind != self.ablation] if len(self.circuits) > 1 else []
        self.kinds = [self.ablation, *others]

    def refit_stages(self) -> list[Stage]:
        """Stages of `refit`."""
        settings, task, n_starts, stages = self.settings, self.task, len(self.circuits), list[Stage]()
        if not ABLATION_KINDS[self.ablation].learned:
            return stages
        if settings.refit_start != "trained":
            n_starts *= 2 if settings.refit_start == "both" else 1
            stages = statistics_stages(["mean"], task)
        passes = fit_passes(n_starts, settings.refit, task.n_validation, 0)
        return [*stages, Stage("refitting the constants", passes)]

    def refit(self) -> None:
        """Refit the constants of the discrete circuits in parallel; do nothing if the ablation is not learned."""
        if not ABLATION_KINDS[self.ablation].learned:
            return
        settings, circuits = self.settings, self.circuits
        starts = [trained.constants for trained in circuits if trained.constants is not None]
        if settings.refit_start != "trained":
            source = AblationSource(self.model, self.task, self.level, self.positions, self.track)
            means = [source.mean] * len(circuits)
            starts = means if settings.refit_start == "mean" else [*starts, *means]
        fitted = fit_constants(
            self.model,
            self.task,
            self.level,
            torch.stack([trained.circuit.mask for trained in circuits]).repeat(len(starts) // len(circuits), 1),
            starts,
            settings.refit,
            loss=circuits[0].circuit.provenance["loss"],
            track=self.track,
            description="refitting the constants",
        )
        best = fitted.validation_loss.view(-1, len(circuits)).argmin(dim=0).tolist()
        for number, (trained, start) in enumerate(zip(circuits, best, strict=True)):
            constants = fitted.sets[start * len(circuits) + number].to("cpu")
            provenance = trained.circuit.provenance
            circuits[number] = replace(trained, constants=replace(constants, provenance=provenance))

    def run(self) -> Findings:
        """Evaluate one circuit, or several."""
        return self._single(self.circuits[0]) if len(self.circuits) == 1 else self._several()

    def plan(self) -> list[Stage]:
        """The circuits under each ablation; for a single circuit also the clean model."""
        task, own = self.task, ABLATION_KINDS[self.ablation].constant
        stages = statistics_stages([kind for kind in self.kinds if not (own and kind == self.ablation)], task)
        stages += [Stage("the circuits", len(self.circuits) * task.n_test) for _ in self.kinds]
        return stages if len(self.circuits) > 1 else [*stages, Stage("the clean model", task.n_test)]

    def _single(self, trained: TrainedCircuit) -> Findings:
        clean, metrics = estimates(self.clean_behaviour()), estimates(self._behaviour(self.ablation, "the circuit"))
        cells = [
            {"": spoken(name), "circuit": value, "clean model": clean[name] if name != "kl" else 0}
            for name, value in metrics.items()
        ]
        metrics |= {f"clean_{name}": value for name, value in clean.items()}
        title = f"{trained.size} kept ({trained.criterion}), on {self.prompts}, mean and 95 % interval"
        return Findings(
            _entry_rows(trained.circuit),
            metrics,
            facts={"ablation": self.ablation, **_price(trained)},
            shown=[
                Table(title, cells),
                f"circuit: {_named(trained.circuit)}",
            ],
            figures=dict(self._pictures(metrics["kl"])),
            circuit=trained.circuit.counts(),
            table="entries",
        )

    def _several(self) -> Findings:
        behaviours = {
            kind: self._behaviour(kind, f"the circuits under {spoken(kind)} ablation") for kind in self.kinds
        }
        rows = [
            {"number": number, **_price(trained), **trained.circuit.counts(), "ablation": kind}
            | estimates(behaviour, number)
            for number, trained in enumerate(self.circuits)
            for kind, behaviour in behaviours.items()
        ]
        kl = {kind: [row["kl"] for row in rows if row["ablation"] == kind] for kind in self.kinds}
        cells = [
            {f"{self.level.parts}, of {len(self.level)}": len(trained.circuit)}
            | {spoken(kind): values[number] for kind, values in kl.items()}
            for number, trained in enumerate(self.circuits)
        ]
        title = f"KL divergence in nats, mean ± 95 % interval, on {self.prompts}"
        pictures = dict(self._pictures(*kl[self.ablation]))
        return Findings(
            rows,
            metrics={f"{number}_kl": value for number, value in enumerate(kl[self.ablation])},
            facts={"ablation": self.ablation},
            shown=[Table(title, cells)],
            figures={"front": partial(self._front, kl), **pictures},
            table="front",
        )

    def _behaviour(self, kind: AblationName, evaluated: str) -> Behaviour:
        own = [trained.constants for trained in self.circuits if trained.constants is not None]
        ablations: Sequence[Ablation] = (
            own if kind == self.ablation and own else [ABLATION_KINDS[kind].prepare(self.source)]
        )
        masks = torch.stack([trained.circuit.mask for trained in self.circuits])
        return self.behaviour(self.level, masks, ablations, evaluated, self.settings.refit.rows_per_run)

    def _pictures(self, *kl: Estimate) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
        several = len(self.circuits) > 1
        for number, (trained, value) in enumerate(zip(self.circuits, kl, strict=True)):
            title = f"{self.subject}: {trained.size}, KL {written(value.mean)} nats"
            yield f"circuit_{number}" if several else "circuit", partial(circuit_picture, trained.circuit, title)
        first = self.circuits[0].circuit
        if first.scores is not None and not several:
            threshold = self.circuits[0].training.get("threshold", 0.5)
            yield "keep_probability", partial(score_picture, self.level, first.scores, threshold)

    def _front(self, kl: Mapping[AblationName, Sequence[Estimate]]) -> Figure:
        sizes = [len(trained.circuit) for trained in self.circuits]
        return front_figure(sizes, kl, len(self.level), self.level.parts, self.subject)


def _entry_rows(circuit: Circuit) -> list[Row]:
    """Every entry with its keep-probability; for large levels and for edges, only the kept entries."""
    level, kept = circuit.level, circuit.mask.tolist()
    scores = circuit.scores.tolist() if circuit.scores is not None else [None] * len(level)
    if len(level) > MOST_ROWS or not level.has_one_stream:
        numbers = circuit.mask.nonzero().flatten().tolist()
        pairs = zip(circuit.names, numbers, strict=True)
        return [{level.part: name, "keep_probability": scores[number]} for name, number in pairs]
    return [
        {level.part: name, "keep_probability": score, "kept": keep}
        for name, score, keep in zip(level.names, scores, kept, strict=True)
    ]


def _price(trained: TrainedCircuit) -> dict[str, Any]:
    return {name: trained.training[name] for name in PRICES if trained.training.get(name) is not None}


def _named(circuit: Circuit) -> str:
    """Names of the entries with the highest keep-probability, as many as fit a line, and where to find the others."""
    names = list(circuit.names)
    if len(names) <= MOST_NAMED:
        return ", ".join(names)
    if circuit.scores is not None:
        scores = dict(zip(names, circuit.scores[circuit.mask].tolist(), strict=True))
        names.sort(key=lambda name: -scores[name])
    return f"{listed(names, MOST_NAMED)} in results.json"
