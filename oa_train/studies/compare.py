"""Learned ablation against mean and zero ablation: of everything outside a circuit, and of each component alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from oa_train.ablations.base import AblationKind
from oa_train.ablations.constants import Constants
from oa_train.artefacts import make_next_folder
from oa_train.circuits.circuit import Circuit
from oa_train.circuits.known import random_circuits
from oa_train.errors import ConfigurationError
from oa_train.figures.comparison import Interval, comparison_figure
from oa_train.figures.style import save_figure
from oa_train.interventions.activations import node_means
from oa_train.interventions.evaluation import Behaviour, circuit_behaviour
from oa_train.models.families import Dimensions
from oa_train.models.loading import CausalLM, fingerprint
from oa_train.progress import Track, silent
from oa_train.shapes import Bool, Tensor
from oa_train.studies.results import results_document, write_results, write_table
from oa_train.studies.statistics import Estimate, estimate, paired_difference
from oa_train.tasks.base import Task
from oa_train.training.constants import RefitSettings, fit_constants
from oa_train.training.data import EVALUATION_BATCH

FIGURES = ("kl", "accuracy", "logit_difference")


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and how the constants for it are trained.

    Attributes:
        fit: training of the constants of each component alone and of the random circuits.
        random_circuits: circuits of the same size that are drawn at random and given optimal constants; 0 for none.
        seed: of the random circuits.
    """

    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=150, batch_size=16, evaluate_every=50))
    random_circuits: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.random_circuits < 0:
            raise ConfigurationError(f"random_circuits is {self.random_circuits}; expected 0 or more.")


@dataclass(frozen=True)
class Comparison:
    """Figures under one ablation.

    Attributes:
        component: `circuit` when everything outside the circuit is ablated, else the one component that is.
        ablation: what replaces it.
        figures: KL divergence, accuracy and logit difference on the test prompts.
        difference_to_optimal: the same figures minus those under optimal ablation, prompt by prompt.
    """

    component: str
    ablation: AblationKind
    figures: Mapping[str, Estimate]
    difference_to_optimal: Mapping[str, Estimate]

    def as_json(self) -> dict[str, Any]:
        """The row of a results file."""
        return {
            "component": self.component,
            "ablation": self.ablation,
            **{name: value.as_json() for name, value in self.figures.items()},
            **{f"{name}_minus_optimal": value.as_json() for name, value in self.difference_to_optimal.items()},
        }


@dataclass(frozen=True)
class Compared:
    """The answer of `compare`.

    Attributes:
        rows: a comparison for the circuit and for each component, under each ablation.
        random_kl: KL divergence of each random circuit under optimal constants, in nats.
        folder: study folder.
    """

    rows: Sequence[Comparison]
    random_kl: Sequence[float]
    folder: Path


def compare(
    model: CausalLM,
    task: Task,
    circuit: Circuit,
    constants: Constants,
    run: str | Path,
    settings: CompareSettings | None = None,
    track: Track = silent,
) -> Compared:
    """Compare optimal, mean and zero ablation on the same held-out prompts.

    Args:
        model: frozen causal language model.
        task: where prompts come from.
        circuit: the circuit.
        constants: its optimal constants.
        run: run folder; results go to `studies/compare_K`.
        settings: how.
        track: progress.
    """
    settings, run = settings or CompareSettings(), Path(run)
    provenance = dict(circuit.provenance)
    if "seed" not in provenance:  # a circuit that was written by hand
        provenance |= {"model": task.lm.name, "revision": task.lm.revision, "family": model.config.model_type}
        provenance |= {"fingerprint": fingerprint(model), "task": task.describe(), "seed": task.seed}
    names = ["circuit", *circuit.components.names]
    masks = torch.cat([circuit.mask.unsqueeze(0), ~torch.eye(len(circuit.components), dtype=torch.bool)])
    sets = _all_constants(model, task, masks, constants, settings, track)
    batches = list(task.batches("test", task.n_test, EVALUATION_BATCH))
    found = {
        kind: circuit_behaviour(model, batches, masks, kind_sets)
        for kind, kind_sets in track(list(sets.items()), "evaluating each ablation")
    }
    rows = [_compare_one(names[i], kind, found, i) for i in range(len(names)) for kind in found]
    random_kl = _random_divergences(model, task, circuit, sets["mean"], settings, track)
    folder = make_next_folder(run / "studies", "compare")
    document = results_document(
        "compare",
        run,
        provenance,
        task.n_test,
        metrics={f"circuit_{row.ablation}_kl": row.figures["kl"].as_json() for row in rows[: len(found)]},
        rows=[row.as_json() for row in rows],
        circuit=circuit.counts(),
        random_circuits={"size": len(circuit), "kl": random_kl},
    )
    write_results(folder, document)
    write_table(folder, "comparison", [row.as_json() for row in rows])
    _draw(rows, circuit, task, folder)
    return Compared(rows, random_kl, folder)


def _all_constants(
    model: CausalLM,
    task: Task,
    masks: Bool[Tensor, "circuit component"],
    constants: Constants,
    settings: CompareSettings,
    track: Track,
) -> dict[AblationKind, Sequence[Constants]]:
    batches = list(task.batches("means", task.n_means, EVALUATION_BATCH))
    means = node_means(model, track(batches, "averaging activations"), task.bos_token_id)
    mean = means.table(constants.n_positions)
    zero = Constants.zeros(Dimensions.of(model.config), task.bos_token_id, constants.n_positions)
    # A run of mean or zero ablation has no learned constants; the circuit gets some like the components.
    learned = [constants] if constants.provenance.get("ablation", "optimal") == "optimal" else []
    alone = fit_constants(
        model,
        task,
        masks[len(learned) :],
        [mean],
        settings.fit,
        others=[zero],
        track=track,
        description="fitting constants of each component alone",
    )
    return {"optimal": [*learned, *alone.sets], "mean": [mean], "zero": [zero]}


def _compare_one(name: str, kind: AblationKind, found: Mapping[AblationKind, Behaviour], index: int) -> Comparison:
    mine = {figure: getattr(found[kind], figure)[index] for figure in FIGURES}
    optimal = {figure: getattr(found["optimal"], figure)[index] for figure in FIGURES}
    return Comparison(
        component=name,
        ablation=kind,
        figures={figure: estimate(values) for figure, values in mine.items()},
        difference_to_optimal={figure: paired_difference(mine[figure], optimal[figure]) for figure in FIGURES},
    )


def _random_divergences(
    model: CausalLM, task: Task, circuit: Circuit, starts: Sequence[Constants], settings: CompareSettings, track: Track
) -> list[float]:
    if not settings.random_circuits:
        return []
    among = circuit.provenance.get("selected", circuit.components.names)
    drawn = random_circuits(circuit.components, len(circuit), settings.random_circuits, settings.seed, among)
    masks = torch.stack([one.mask for one in drawn])
    fitted = fit_constants(
        model, task, masks, starts, settings.fit, track=track, description="fitting constants of random circuits"
    )
    batches = list(task.batches("test", task.n_test, EVALUATION_BATCH))
    kl: list[float] = circuit_behaviour(model, batches, masks, fitted.sets).kl.mean(dim=1).tolist()
    return kl


def _draw(rows: Sequence[Comparison], circuit: Circuit, task: Task, folder: Path) -> None:
    def intervals(of_circuit: bool) -> dict[str, list[Interval]]:
        drawn: dict[str, list[Interval]] = {}
        for row in rows:
            if (row.component == "circuit") == of_circuit:
                kl = row.figures["kl"]
                drawn.setdefault(row.ablation, []).append(Interval(kl.mean, *kl.ci95))
        return drawn

    title = (
        f"{circuit.provenance.get('model', 'model')}, {task.name}: {len(circuit)} of {len(circuit.components)} kept"
    )
    of_circuit = {kind: found[0] for kind, found in intervals(True).items()}
    figure = comparison_figure(of_circuit, intervals(False), circuit.components.names, title)
    save_figure(figure, folder / "figures" / "comparison.png")
