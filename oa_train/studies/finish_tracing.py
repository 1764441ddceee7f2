"""The end of training constants for causal tracing: they are written, with their losses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from oa_train.ablations.tracing_constants import TracingConstants
from oa_train.models.frozen import CausalLM
from oa_train.progress import Track, silent
from oa_train.shapes import Float, Tensor
from oa_train.studies.finish import FinishSettings
from oa_train.studies.study import Findings, Study, Table
from oa_train.studies.trace_tables import NOTHING, place
from oa_train.tasks.task import Task


def finish_tracing(
    model: CausalLM,
    task: Task,
    constants: TracingConstants,
    losses: Float[Tensor, " run"],
    run: str | Path,
    track: Track = silent,
) -> Findings:
    """Write `tracing/` and `studies/fit_K/` to a run folder.

    Args:
        model: frozen causal language model.
        task: the task that the constants were trained on.
        constants: the constants, from `TracingModule.tracing_constants`.
        losses: validation loss of each traced run.
        run: run folder.
        track: progress.
    """
    constants.save(run)
    study = _Losses(model, task, [constants], track=track)
    study.losses = losses
    return study.run_in(run)


class _Losses(Study[FinishSettings]):
    """Losses of the best constants on the validation prompts; a row for each run."""

    name = "fit"
    Settings: ClassVar[type] = FinishSettings
    FromRun: ClassVar[type[Any]] = TracingConstants
    asks_of = "one"
    losses: Float[Tensor, " run"]

    def run(self) -> Findings:
        """Convert the losses to rows and a table. No model is run."""
        tracing = self.from_runs[0].tracing
        rows: list[Mapping[str, Any]] = [
            {"restored": run.kind, "at": run.span, "window": run.window, "layer": run.layer, "probability_lost": loss}
            for run, loss in zip(tracing.runs, self.losses[:-1].tolist(), strict=True)
        ]
        cells = []
        for first in range(0, len(rows), len(tracing.layers)):
            losses = self.losses[first : first + len(tracing.layers)]
            row = rows[first]
            cells.append(
                {"restored": row["restored"], "at": place(row["at"]), "layers": row["window"]}
                | {"least lost, at layer": f"{float(losses.min()):.3g}, {tracing.layers[int(losses.argmin())]}"}
                | {"most lost, at layer": f"{float(losses.max()):.3g}, {tracing.layers[int(losses.argmax())]}"}
            )
        rows.append({"restored": NOTHING, "probability_lost": float(self.losses[-1])})
        title = (
            f"Drop in the answers' probability under the best constants, on {self.task.n_validation} validation "
            f"prompts; {float(self.losses[-1]):.3g} with nothing restored"
        )
        return Findings(rows, shown=[Table(title, cells)], table="tracing")
