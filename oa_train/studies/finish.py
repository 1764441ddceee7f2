"""After a fit: threshold the masks, refit the constants on the discrete circuit, evaluate, write it all down."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import Behaviour, circuit_behaviour, clean_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import AblationSource
from oa_train.artefacts import make_next_folder
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.figures.style import save_figure
from oa_train.metrics.estimates import Estimate, estimate
from oa_train.metrics.measures import MEASURES
from oa_train.progress import Track, silent
from oa_train.studies.results import results_document, write_results
from oa_train.tasks.task import Task
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.pictures import circuit_picture, score_picture

RefitStart = Literal["trained", "mean", "both"]

# Of a level with more entries a results file lists the kept ones alone.
MOST_ROWS = 2000


@dataclass(frozen=True)
class FinishSettings:
    """What happens when training is over.

    Attributes:
        refit: how the constants are trained once more, on the discrete circuit.
        refit_start: where that starts: `trained`, the constants that were trained with the masks; `mean`, the means;
            `both`, each of them, and the better by validation is kept. From the means a refit can end in a worse
            optimum.
        size: components or edges of the circuit: those of the highest keep-probability, of edges none that leads
            nowhere. When not given, all above the module's threshold.
    """

    refit: RefitSettings = field(default_factory=RefitSettings)
    refit_start: RefitStart = "trained"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.refit_start not in get_args(RefitStart):
            sentence = nearest_names(self.refit_start, get_args(RefitStart))
            raise ConfigurationError(f"finish.refit_start is {self.refit_start!r}. {sentence}")
        if self.size is not None and self.size < 1:
            raise ConfigurationError(f"finish.size is {self.size}; expected at least 1.")


@dataclass(frozen=True, eq=False)
class Finished:
    """A circuit with what replaces the rest, and what it is worth.

    Attributes:
        circuit: the discrete circuit.
        constants: its constants, refitted if they are learned; None when the ablation is not one by constants.
        metrics: figures of the circuit on the test prompts, and of the clean model as `clean_...`.
        folder: study folder with results and figures.
    """

    circuit: Circuit
    constants: Constants | None
    metrics: dict[str, Estimate]
    folder: Path


def finish(
    module: CircuitModule,
    task: Task,
    run: str | Path,
    settings: FinishSettings | None = None,
    track: Track = silent,
) -> Finished:
    """Turn a trained module into artefacts: `circuit/`, `constants/` and `studies/fit_K/` in the run folder.

    Args:
        module: the trained module, with its best checkpoint loaded.
        task: the task it was trained on.
        run: run folder.
        settings: refit.
        track: progress.
    """
    settings, run = settings or FinishSettings(), Path(run)
    circuit = module.circuit(size=settings.size)
    # Written before the refit starts, so that an interruption loses no more than the refit.
    circuit.save(run / "circuit")
    ablation = final_ablations(module, task, [circuit], settings, track)[0]
    constants = ablation if isinstance(ablation, Constants) else None
    if constants is not None:
        constants.save(run / "constants")
    metrics = _evaluated(module, task, circuit, ablation, settings.refit.rows_per_run, track)
    folder = make_next_folder(run / "studies", "fit")
    document = results_document(
        "fit",
        run,
        circuit.provenance,
        task.n_test,
        metrics={name: value.as_json() for name, value in metrics.items()},
        rows=_rows(circuit),
        circuit=circuit.counts(),
        ablation=module.ablation,
        **module.penalties.of_circuit(0),
    )
    write_results(folder, document)
    _draw(circuit, module.masks.threshold, folder, metrics)
    return Finished(circuit, constants, metrics, folder)


def summary(behaviour: Behaviour, index: int = 0) -> dict[str, Estimate]:
    """Estimates of all measures of one circuit."""
    return {name: estimate(getattr(behaviour, name)[index]) for name in MEASURES}


def _evaluated(
    module: CircuitModule, task: Task, circuit: Circuit, ablation: Ablation, rows_per_run: int, track: Track
) -> dict[str, Estimate]:
    batches = list(task.batches("test", task.n_test))
    masks = circuit.mask.unsqueeze(0)
    shown = track(batches, "evaluating the circuit")
    behaviour = circuit_behaviour(module.frozen, shown, module.level, masks, [ablation], rows_per_run)
    clean = clean_behaviour(module.frozen, track(batches, "evaluating the clean model"))
    return summary(behaviour) | {f"clean_{name}": value for name, value in summary(clean).items()}


def final_ablations(
    module: CircuitModule, task: Task, circuits: Sequence[Circuit], settings: FinishSettings, track: Track
) -> list[Ablation]:
    """What replaces the rest of each circuit in the end: refitted constants, or what it was trained with.

    Args:
        module: the trained module.
        task: the task it was trained on.
        circuits: all that it has trained.
        settings: refit; the constants of all circuits are trained side by side.
        track: progress.
    """
    source = AblationSource(module.frozen, task, module.level, module.positions, track)
    replacements = module.replacements
    if replacements.constants is None:
        return [replacements.kind.prepare(source)] * len(circuits)
    trained = [constants.detach().to("cpu") for constants in replacements.constants.sets()]
    if not replacements.kind.learned:
        return _of_circuits(trained, circuits)
    means = [] if settings.refit_start == "trained" else [source.mean] * len(circuits)
    starts = means if settings.refit_start == "mean" else [*trained, *means]
    masks = torch.stack([circuit.mask for circuit in circuits]).repeat(len(starts) // len(circuits), 1)
    fitted = fit_constants(
        module.frozen,
        task,
        module.level,
        masks,
        starts,
        settings.refit,
        loss=module.loss,
        track=track,
        description="refitting the constants",
    )
    best = fitted.validation_loss.view(-1, len(circuits)).argmin(dim=0).tolist()
    chosen = [fitted.sets[start * len(circuits) + number].to("cpu") for number, start in enumerate(best)]
    return _of_circuits(chosen, circuits)


def _of_circuits(constants: Sequence[Constants], circuits: Sequence[Circuit]) -> list[Ablation]:
    pairs = zip(constants, circuits, strict=True)
    return [replace(each, provenance=circuit.provenance) for each, circuit in pairs]


def _rows(circuit: Circuit) -> list[dict[str, Any]]:
    """Every entry with its score; where there may be millions, those that are kept."""
    level = circuit.level
    scores = circuit.scores.tolist() if circuit.scores is not None else [None] * len(level)
    kept = circuit.mask.tolist()
    if len(level) > MOST_ROWS or not level.has_one_stream:
        numbers = circuit.mask.nonzero().flatten().tolist()
        pairs = zip(circuit.names, numbers, strict=True)
        return [{level.part: name, "keep_probability": scores[number]} for name, number in pairs]
    return [
        {level.part: name, "keep_probability": score, "kept": keep}
        for name, score, keep in zip(level.names, scores, kept, strict=True)
    ]


def _draw(circuit: Circuit, threshold: float, folder: Path, metrics: dict[str, Estimate]) -> None:
    title = f"{len(circuit)} of {len(circuit.level)} {circuit.level.parts}, KL {metrics['kl'].mean:.3g} nats"
    drawing = circuit_picture(circuit, title)
    if drawing is not None:
        save_figure(drawing, folder / "figures" / "circuit.png")
    if circuit.scores is not None:
        heat_map = score_picture(circuit.level, circuit.scores, threshold)
        save_figure(heat_map, folder / "figures" / "keep_probability.png")
