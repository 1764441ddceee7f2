"""After constants were trained alone: write them down, and evaluate what they replace on held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oa_train.ablations.constants import Constants
from oa_train.artefacts import make_next_folder
from oa_train.figures.comparison import Interval, Panel, comparison_figure
from oa_train.figures.style import save_figure
from oa_train.metrics.estimates import Estimate
from oa_train.progress import Track, silent
from oa_train.studies.finish import summary
from oa_train.studies.results import results_document, write_results, write_table
from oa_train.tasks.task import Task
from oa_train.training.constants_module import ConstantsModule


@dataclass(frozen=True, eq=False)
class FinishedConstants:
    """Trained constants and what they are worth.

    Attributes:
        constants: the best by validation; of components that were ablated alone, each its own.
        metrics: for `circuit`, or for each component ablated alone, the measures on the test prompts.
        folder: study folder with results.
    """

    constants: Constants
    metrics: dict[str, dict[str, Estimate]]
    folder: Path


def finish_constants(module: ConstantsModule, task: Task, run: str | Path, track: Track = silent) -> FinishedConstants:
    """Turn a trained module into artefacts: `constants/`, `circuit/` if there is one, and `studies/fit_K/`.

    Args:
        module: the trained module.
        task: the task it was trained on.
        run: run folder.
        track: progress.
    """
    run, constants = Path(run), module.best_constants()
    if not module.each_alone:
        module.circuit().save(run / "circuit")
    constants.save(run / "constants")
    batches = track(list(task.batches("test", task.n_test)), "evaluating the constants")
    behaviour = module.fitted.behaviour(module.frozen, batches, [constants])
    metrics = {name: summary(behaviour, index) for index, name in enumerate(module.circuits)}
    folder = make_next_folder(run / "studies", "fit")
    rows = [_row(name, figures) for name, figures in metrics.items()]
    alone = module.each_alone
    document = results_document(
        "fit",
        run,
        module.provenance(),
        task.n_test,
        metrics={} if alone else {name: figure.as_json() for name, figure in metrics["circuit"].items()},
        rows=rows,
        circuit=None if alone else module.circuits["circuit"].counts(),
        ablation="optimal",
    )
    write_results(folder, document)
    write_table(folder, "constants", rows)
    if alone:
        _draw(metrics, list(module.circuits), f"{module.lm.name}, {task.name}", folder)
    return FinishedConstants(constants, metrics, folder)


def _row(name: str, figures: dict[str, Estimate]) -> dict[str, Any]:
    return {"component": name, "ablation": "optimal", **{key: value.as_json() for key, value in figures.items()}}


def _draw(metrics: dict[str, dict[str, Estimate]], names: Sequence[str], title: str, folder: Path) -> None:
    intervals = [Interval(figures["kl"].mean, *figures["kl"].ci95) for figures in metrics.values()]
    figure = comparison_figure([Panel("one component ablated", names, {"optimal": intervals})], title)
    save_figure(figure, folder / "figures" / "components.png")
