"""After a fit of several circuits side by side: the front of what they lose against what they keep."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.registry import KINDS, AblationKind, AblationSource
from oa_train.artefacts import make_next_folder
from oa_train.circuits.circuit import Circuit
from oa_train.figures.comparison import Interval
from oa_train.figures.fronts import front_figure
from oa_train.figures.style import save_figure
from oa_train.metrics.estimates import Estimate
from oa_train.progress import Track, silent
from oa_train.studies.finish import FinishSettings, final_ablations, summary
from oa_train.studies.results import results_document, write_results, write_table
from oa_train.tasks.task import Task
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.pictures import circuit_picture

# Beside the ablation that the circuits were trained under; what they lose by it alone shows what learning is worth.
COMPARED: tuple[AblationKind, ...] = ("mean", "zero")


@dataclass(frozen=True, eq=False)
class Front:
    """Circuits that were trained side by side, with what replaces the rest, and what they are worth.

    Attributes:
        circuits: the discrete circuits, in the order of their penalty weights or target sizes.
        constants: of each, refitted if they are learned; empty when the ablation is not one by constants.
        metrics: by ablation, the measures of each circuit on the test prompts.
        folder: study folder with results, table and figures.
    """

    circuits: list[Circuit]
    constants: list[Constants]
    metrics: dict[AblationKind, list[dict[str, Estimate]]]
    folder: Path


def finish_front(
    module: CircuitModule,
    task: Task,
    run: str | Path,
    settings: FinishSettings | None = None,
    track: Track = silent,
) -> Front:
    """Turn a module of several circuits into artefacts: `front/N/circuit/`, `front/N/constants/`, `studies/fit_K/`.

    Each `front/N` can be read as a finished run.

    Args:
        module: the trained module, with its best checkpoint loaded.
        task: the task it was trained on.
        run: run folder.
        settings: refit; all circuits are refitted side by side.
        track: progress.
    """
    settings, run = settings or FinishSettings(), Path(run)
    circuits = module.circuits(settings.size)
    folders = [run / "front" / str(number) for number in range(len(circuits))]
    for circuit, folder in zip(circuits, folders, strict=True):
        circuit.save(folder / "circuit")
    ablations = final_ablations(module, task, circuits, settings, track)
    constants = [ablation for ablation in ablations if isinstance(ablation, Constants)]
    for each, folder in zip(constants, folders, strict=len(constants) > 0):
        each.save(folder / "constants")
    metrics = _metrics(module, task, circuits, ablations, settings, track)
    front = Front(circuits, constants, metrics, make_next_folder(run / "studies", "fit"))
    _write(front, module, task, run)
    _draw(front, module, task)
    return front


def _metrics(
    module: CircuitModule,
    task: Task,
    circuits: list[Circuit],
    ablations: list[Ablation],
    settings: FinishSettings,
    track: Track,
) -> dict[AblationKind, list[dict[str, Estimate]]]:
    source = AblationSource(module.frozen, task, module.level, module.positions, track)
    others = {kind: [KINDS[kind].prepare(source)] for kind in COMPARED if kind != module.ablation}
    masks = torch.stack([circuit.mask for circuit in circuits])
    batches = list(task.batches("test", task.n_test))
    metrics: dict[AblationKind, list[dict[str, Estimate]]] = {}
    for kind, replacing in {module.ablation: ablations, **others}.items():
        shown = track(batches, f"evaluating the circuits under {kind} ablation")
        behaviour = circuit_behaviour(
            module.frozen, shown, module.level, masks, replacing, settings.refit.rows_per_run
        )
        metrics[kind] = [summary(behaviour, number) for number in range(len(circuits))]
    return metrics


def _write(front: Front, module: CircuitModule, task: Task, run: Path) -> None:
    rows = _rows(front, module)
    document = results_document(
        "fit",
        run,
        front.circuits[0].provenance,
        task.n_test,
        metrics={
            f"{number}_kl": figures["kl"].as_json() for number, figures in enumerate(front.metrics[module.ablation])
        },
        rows=rows,
        ablation=module.ablation,
    )
    write_results(front.folder, document)
    write_table(front.folder, "front", rows)


def _rows(front: Front, module: CircuitModule) -> list[dict[str, Any]]:
    """A row for each circuit and ablation."""
    return [
        {
            "number": number,
            **module.penalties.of_circuit(number),
            **circuit.counts(),
            "ablation": kind,
            **{name: value.as_json() for name, value in figures[number].items()},
        }
        for number, circuit in enumerate(front.circuits)
        for kind, figures in front.metrics.items()
    ]


def _draw(front: Front, module: CircuitModule, task: Task) -> None:
    kl: dict[str, list[Interval]] = {
        kind: [Interval(each["kl"].mean, *each["kl"].ci95) for each in figures]
        for kind, figures in front.metrics.items()
    }
    first = front.circuits[0]
    sizes, title = [len(circuit) for circuit in front.circuits], f"{module.lm.name}, {task.name}"
    figure = front_figure(sizes, kl, len(first.level), first.level.parts, title)
    save_figure(figure, front.folder / "figures" / "front.png")
    for number, circuit in enumerate(front.circuits):
        lost = front.metrics[module.ablation][number]["kl"].mean
        drawing = circuit_picture(
            circuit, f"{len(circuit)} of {len(circuit.level)} {circuit.level.parts}, KL {lost:.3g} nats"
        )
        if drawing is not None:
            save_figure(drawing, front.folder / "figures" / f"circuit_{number}.png")
