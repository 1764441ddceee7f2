"""The end of training lenses: they are written, with their losses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from oa_train.lenses.trained_lenses import TrainedLenses
from oa_train.models.frozen import CausalLM
from oa_train.progress import Track, silent
from oa_train.shapes import Float, Tensor
from oa_train.studies.finish import FinishSettings
from oa_train.studies.study import Findings, Study, Table, spoken
from oa_train.tasks.task import Task


def finish_lenses(
    model: CausalLM,
    task: Task,
    lenses: TrainedLenses,
    losses: Mapping[str, Float[Tensor, " start"]],
    run: str | Path,
    track: Track = silent,
) -> Findings:
    """Write `lens/` and `studies/fit_K/` to a run folder.

    Args:
        model: frozen causal language model.
        task: the task that the lenses were trained on.
        lenses: the lenses, from `LensModule.trained_lenses`.
        losses: losses by kind of lens, from `LensModule.validation_losses`.
        run: run folder.
        track: progress.
    """
    lenses.save(run)
    study = _Losses(model, task, [lenses], track=track)
    study.losses = losses
    return study.run_in(run)


class _Losses(Study[FinishSettings]):
    """Validation losses of the best lenses; a row for each lens and layer."""

    name = "fit"
    Settings: ClassVar[type] = FinishSettings
    FromRun: ClassVar[type[Any]] = TrainedLenses
    asks_of = "one"
    losses: Mapping[str, Float[Tensor, " start"]]

    def run(self) -> Findings:
        """Convert the losses to rows and a table. No model is run."""
        layers = self.from_runs[0].layers
        by_layer = {kind: losses.expand(len(layers)).tolist() for kind, losses in self.losses.items()}
        rows = [
            {"lens": kind, "layer": layer, "kl": loss}
            for kind, losses in by_layer.items()
            for layer, loss in zip(layers, losses, strict=True)
        ]
        cells = [
            {"layer": layer} | {spoken(kind): by_layer[kind][number] for kind in by_layer}
            for number, layer in enumerate(layers)
        ]
        title = f"KL divergence in nats of the best lenses, on {self.task.n_validation} validation prompts"
        return Findings(rows, shown=[Table(title, cells)], table="lenses")
