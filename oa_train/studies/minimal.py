"""Whether a circuit is minimal, and whether it is complete.

Minimal: each of its parts is needed. Every one of them is taken out in turn.
Complete: nothing outside of it can do the task. All of its parts are ablated, and everything else is kept.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import Behaviour, circuit_behaviour, clean_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import KINDS, AblationSource
from oa_train.artefacts import make_next_folder
from oa_train.circuits.random import random_circuits
from oa_train.errors import ConfigurationError
from oa_train.figures.comparison import Interval
from oa_train.figures.style import save_figure
from oa_train.figures.worth import worth_figure
from oa_train.metrics.estimates import Estimate, paired_difference
from oa_train.metrics.measures import MEASURES
from oa_train.models.loading import CausalLM, fingerprint
from oa_train.progress import Track, silent
from oa_train.shapes import Bool, Tensor
from oa_train.studies.finish import summary
from oa_train.studies.minimality import Minimality, Removal, verdict
from oa_train.studies.results import results_document, write_results, write_table
from oa_train.studies.runs import TrainedCircuit
from oa_train.tasks.task import Task


@dataclass(frozen=True)
class MinimalSettings:
    """What is asked of a circuit, and how constants for it are trained.

    Attributes:
        refit: whether the circuit without a part is given constants of its own, and the whole circuit the same
            training beside it. Otherwise the run's constants stand in, which were not made for the part's absence.
        tolerance: nats that do not matter: a part is superfluous when the whole 95 % interval of what it is worth lies
            at or below.
        random_complements: random circuits of equal size whose parts are ablated as well, for scale; 0 for none.
        fit: training of the constants of circuits without a part, and of complements.
        seed: of the random circuits.
    """

    refit: bool = False
    tolerance: float = 0.001
    random_complements: int = 5
    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=150, batch_size=16, evaluate_every=50))
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tolerance", "random_complements"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; expected 0 or more.")


def minimal(
    model: CausalLM,
    task: Task,
    run: TrainedCircuit,
    folder: str | Path,
    settings: MinimalSettings | None = None,
    track: Track = silent,
) -> Minimality:
    """Ask of each part of a circuit whether it is needed, and of the model what it does without the circuit.

    All of this is done under the ablation that the circuit was trained under. Parts that its training could not leave
    out are in no question: they stay, in the complement too.

    Args:
        model: frozen causal language model.
        task: where prompts come from.
        run: a trained circuit of this model.
        folder: run folder; results go to `studies/minimal_K`.
        settings: what is asked, and how.
        track: progress.

    Raises:
        ConfigurationError: the circuit has no parts, a refit was asked for under an ablation that learns nothing, or
            the run has no constants where its ablation is by constants.
        TaskError: the ablation needs counterfactuals and the task has none.
    """
    settings = settings or MinimalSettings()
    study = _Study(model, task, run, settings, track)
    whole, found = study.without_each_part()
    removals = sorted(found, key=lambda removal: -removal.increase.mean)
    complement, *random = study.complements()
    minimality = Minimality(
        circuit=run.circuit,
        ablation=run.ablation,
        figures=summary(whole),
        removals=removals,
        together=study.without_all_of([one.names[0] for one in removals if one.verdict == "superfluous"]),
        complement=complement,
        random_complements=random,
        clean=study.clean(),
        folder=make_next_folder(Path(folder) / "studies", "minimal"),
    )
    _write(minimality, study, Path(folder))
    _draw(minimality, study)
    return minimality


class _Study:
    """What `minimal` works on: the circuit's parts that are in question, as masks, and what replaces the rest."""

    def __init__(
        self, model: CausalLM, task: Task, run: TrainedCircuit, settings: MinimalSettings, track: Track
    ) -> None:
        self.model = model
        self.task = task
        self.run = run
        self.settings = settings
        self.track = track
        self.kind = KINDS[run.ablation]
        self.level, self.mask = run.circuit.level, run.circuit.mask
        self.selected: Sequence[str] = run.circuit.provenance.get("selected", ["*"])
        self._in_question = self.level.selected(self.selected)
        self._check()
        self.batches = list(task.batches("test", task.n_test))
        self.source = AblationSource(model, task, self.level, _positions(run), track)

    def _check(self) -> None:
        if not (self.mask & self._in_question).any():
            raise ConfigurationError(
                f"{self.run.name} keeps none of the {self.level.parts} that it could leave out, so there is nothing "
                f"to ask about."
            )
        if self.settings.refit and not self.kind.learned:
            raise ConfigurationError(
                f"refit is true, but {self.run.name} was trained under {self.kind.name} ablation, which has nothing "
                "to train. Leave refit out."
            )
        if self.kind.constant and self.run.constants is None:
            raise ConfigurationError(
                f"{self.run.name} has no constants, and {self.kind.name} ablation is by constants. Train some with "
                "fit_constants."
            )

    def without_each_part(self) -> tuple[Behaviour, list[Removal]]:
        """The whole circuit, and the circuit without each part, in mask order."""
        numbers = (self.mask & self._in_question).nonzero().flatten()
        return self._without([[number] for number in numbers.tolist()])

    def without_all_of(self, names: Sequence[str]) -> Removal | None:
        """The circuit without several parts at once; None where that is nothing new."""
        if len(names) < 2:
            return None
        _, (removal,) = self._without([[self.level.index(name) for name in names]])
        return removal

    def _without(self, removed: Sequence[Sequence[int]]) -> tuple[Behaviour, list[Removal]]:
        """Take out mask entries, several sets of them in turn; first of all nothing."""
        masks = self.mask.repeat(1 + len(removed), 1)
        for row, entries in enumerate(removed, start=1):
            masks[row, list(entries)] = False
        masks = self.level.prune(masks)
        found = self._behaviour(masks, self._ablations(masks), "evaluating circuits without a part")
        return found, [self._removal(found, masks, row, entries) for row, entries in enumerate(removed, start=1)]

    def _removal(self, found: Behaviour, masks: Tensor, row: int, entries: Sequence[int]) -> Removal:
        gone = masks[0] & ~masks[row]
        gone[list(entries)] = False
        difference = {name: paired_difference(getattr(found, name)[row], getattr(found, name)[0]) for name in MEASURES}
        return Removal(
            names=tuple(self.level.names[entry] for entry in entries),
            dangling=int(gone.sum()),
            figures=summary(found, row),
            difference=difference,
            verdict=verdict(difference["kl"], self.settings.tolerance),
        )

    def complements(self) -> list[dict[str, Estimate]]:
        """The model with the circuit's parts ablated, and those of random circuits, everything else being kept."""
        drawn = random_circuits(
            self.level,
            len(self.run.circuit),
            self.settings.random_complements,
            self.settings.seed,
            self.selected,
        )
        circuits = torch.stack([self.mask, *(each.mask for each in drawn)])
        masks = ~(circuits & self._in_question)
        found = self._behaviour(masks, self._complement_ablations(masks), "evaluating complements")
        return [summary(found, row) for row in range(len(masks))]

    def clean(self) -> dict[str, Estimate]:
        """The model itself."""
        return summary(clean_behaviour(self.model, self.track(self.batches, "evaluating the clean model")))

    def _ablations(self, masks: Bool[Tensor, "circuit entry"]) -> list[Ablation]:
        """What replaces the rest of the circuits that parts were taken out of: one for all, or one for each."""
        if not self.settings.refit:
            return [self._own()]
        assert self.run.constants is not None
        return self._fitted(masks, self.run.constants, [], "fitting constants without a part")

    def _complement_ablations(self, masks: Bool[Tensor, "circuit entry"]) -> list[Ablation]:
        if not self.kind.learned:
            return [self._own()]
        means = self.source.mean
        return self._fitted(masks, means, [means, self.source.zero], "fitting constants of complements")

    def _own(self) -> Ablation:
        """What the run has replaced by."""
        return self.run.constants if self.run.constants is not None else self.kind.prepare(self.source)

    def _fitted(
        self, masks: Bool[Tensor, "circuit entry"], start: Constants, others: Sequence[Constants], description: str
    ) -> list[Ablation]:
        fitted = fit_constants(
            self.model,
            self.task,
            self.level,
            masks,
            [start],
            self.settings.fit,
            others=others,
            track=self.track,
            description=description,
        )
        return list(fitted.sets)

    def _behaviour(self, masks: Tensor, ablations: Sequence[Ablation], description: str) -> Behaviour:
        shown = self.track(self.batches, description)
        return circuit_behaviour(self.model, shown, self.level, masks, ablations, self.settings.fit.rows_per_run)


def _positions(run: TrainedCircuit) -> int:
    """Rows of the tables of constants that the run was trained with."""
    if run.constants is not None:
        return run.constants.n_positions
    positions: int = run.circuit.provenance.get("training", {}).get("positions", 1)
    return positions


def _write(minimality: Minimality, study: _Study, folder: Path) -> None:
    rows = _rows(minimality)
    document = results_document(
        "minimal",
        folder,
        _provenance(study),
        study.task.n_test,
        metrics={
            **{f"circuit_{name}": value.as_json() for name, value in minimality.figures.items()},
            **{f"complement_{name}": value.as_json() for name, value in minimality.complement.items()},
            **{f"clean_{name}": value.as_json() for name, value in minimality.clean.items()},
        },
        rows=rows,
        circuit=minimality.circuit.counts(),
        ablation=minimality.ablation,
        superfluous=_superfluous(minimality),
        random_complements=[
            {name: value.as_json() for name, value in figures.items()} for figures in minimality.random_complements
        ],
        settings=asdict(study.settings),
    )
    write_results(minimality.folder, document)
    write_table(minimality.folder, "parts", rows)


def _provenance(study: _Study) -> dict[str, Any]:
    return {
        "model": study.task.lm.name,
        "revision": study.task.lm.revision,
        "family": study.model.config.model_type,
        "fingerprint": fingerprint(study.model),
        "task": study.task.describe(),
        "seed": study.settings.seed,
    }


def _rows(minimality: Minimality) -> list[dict[str, Any]]:
    """A row for each part that was taken out, the one that is worth most first."""
    return [{minimality.circuit.level.part: removal.names[0], **removal.as_json()} for removal in minimality.removals]


def _superfluous(minimality: Minimality) -> dict[str, Any]:
    together = minimality.together
    return {
        "names": minimality.of_verdict("superfluous"),
        "kl_minus_circuit_apart": minimality.apart,
        **({} if together is None else {"together": together.as_json()}),
    }


def _draw(minimality: Minimality, study: _Study) -> None:
    circuit, kl = minimality.circuit, minimality.figures["kl"].mean
    size = f"{len(circuit)} of {len(circuit.level)} {circuit.level.parts}, KL {kl:.3g} nats"
    ablation = minimality.ablation.replace("_", " ") + " ablation" + (", refitted" if study.settings.refit else "")
    figure = worth_figure(
        [removal.names[0] for removal in minimality.removals],
        [Interval(one.increase.mean, *one.increase.ci95) for one in minimality.removals],
        [removal.verdict for removal in minimality.removals],
        study.settings.tolerance,
        f"{study.task.lm.name}, {study.task.name}: {size} ({ablation})",
    )
    save_figure(figure, minimality.folder / "figures" / "worth.png")
