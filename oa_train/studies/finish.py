"""The end of a fit, dispatched by the kind of module that was trained."""

from pathlib import Path

from oa_train.ablations.trained_circuit import run_name
from oa_train.studies.finish_circuits import FinishSettings, finish
from oa_train.studies.finish_constants import finish_constants
from oa_train.studies.finish_losses import finish_lenses, finish_tracing
from oa_train.studies.study import Findings
from oa_train.tasks.task import Task
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.lens_module import LensModule
from oa_train.training.module import FrozenModelModule
from oa_train.training.tracing_module import TracingModule


def finish_fit(module: FrozenModelModule, task: Task, run: Path, settings: FinishSettings) -> Findings | None:
    """Evaluate what a module has trained and write it to a run folder.

    Args:
        module: the module in its best state.
        task: the task that it was trained on.
        run: run folder.
        settings: settings of the refit of circuits.

    Returns:
        None for a module of the user's own, for which nothing is written.
    """
    model, track = module.frozen, module.track
    if isinstance(module, CircuitModule):
        return finish(model, task, module.trained_circuits(settings.size), run, settings, track).findings
    if isinstance(module, ConstantsModule):
        return finish_constants(model, task, module.trained_circuits(), run, track).findings
    if isinstance(module, TracingModule):
        return finish_tracing(model, task, module.tracing_constants(run_name(run)), module.best.loss.cpu(), run, track)
    if isinstance(module, LensModule):
        return finish_lenses(model, task, module.trained_lenses(run_name(run)), module.validation_losses(), run, track)
    return None
