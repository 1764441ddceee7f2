"""The end of training lenses, or constants for causal tracing: they are written, with their losses."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from oa_train.ablations.tracing_constants import TracingConstants
from oa_train.lenses.trained_lenses import TrainedLenses
from oa_train.models.frozen import CausalLM
from oa_train.progress import Track, silent
from oa_train.shapes import Float, Tensor
from oa_train.studies.finish_circuits import FinishSettings
from oa_train.studies.study import Findings, Study, Table, spoken
from oa_train.studies.trace_tables import NOTHING, by_place, place, where
from oa_train.tasks.task import Task

NO_VALIDATION = "No validation took place, so the last state is kept, and its losses are unknown."


def finish_lenses(
    model: CausalLM,
    task: Task,
    lenses: TrainedLenses,
    losses: Mapping[str, Float[Tensor, " start"]],
    run: str | Path,
    track: Track = silent,
) -> Findings:
    """Write `lens/` and `studies/fit_K/` to a run folder; a row for each lens and layer.

    `lenses` are from `LensModule.trained_lenses`, and `losses`, by kind of lens, from `LensModule.validation_losses`.
    """
    lenses.save(run)
    layers = lenses.layers
    by_layer = {kind: of_kind.expand(len(layers)).tolist() for kind, of_kind in losses.items()}
    rows = [
        {"lens": kind, "layer": layer, "kl": _known(loss)}
        for kind, of_kind in by_layer.items()
        for layer, loss in zip(layers, of_kind, strict=True)
    ]
    cells = [
        {"layer": layer} | {spoken(kind): of_kind[number] for kind, of_kind in by_layer.items()}
        for number, layer in enumerate(layers)
    ]
    title = f"KL divergence in nats of the best lenses, on {task.n_validation} validation prompts"
    study = _Losses(model, task, [lenses], track=track)
    validated = all(math.isfinite(loss) for of_kind in by_layer.values() for loss in of_kind)
    study.findings = Findings(rows, shown=[Table(title, cells) if validated else NO_VALIDATION], table="lenses")
    return study.run_in(run)


def finish_tracing(
    model: CausalLM,
    task: Task,
    constants: TracingConstants,
    losses: Float[Tensor, " run"],
    run: str | Path,
    track: Track = silent,
) -> Findings:
    """Write `tracing/` and `studies/fit_K/` to a run folder; a row for each traced run.

    `constants` are from `TracingModule.tracing_constants`, and `losses` has the validation loss of each traced run.
    """
    constants.save(run)
    tracing, unrestored = constants.tracing, float(losses[-1])
    rows: list[dict[str, Any]] = [
        where(traced) | {"layer": traced.layer, "probability_lost": _known(loss)}
        for traced, loss in zip(tracing.runs, losses[:-1].tolist(), strict=True)
    ]
    rows.append({"restored": NOTHING, "probability_lost": _known(unrestored)})
    cells = [
        {"restored": first.kind, "at": place(first.span), "layers": first.window}
        | {"least lost, at layer": f"{float(losses[runs].min()):.3g}, {tracing.layers[int(losses[runs].argmin())]}"}
        | {"most lost, at layer": f"{float(losses[runs].max()):.3g}, {tracing.layers[int(losses[runs].argmax())]}"}
        for first, runs in by_place(tracing)
    ]
    title = (
        f"Drop in the answers' probability under the best constants, on {task.n_validation} validation prompts; "
        f"{unrestored:.3g} with nothing restored"
    )
    study = _Losses(model, task, [constants], track=track)
    validated = bool(losses.isfinite().all())
    study.findings = Findings(rows, shown=[Table(title, cells) if validated else NO_VALIDATION], table="tracing")
    return study.run_in(run)


def _known(loss: float) -> float | None:
    """A loss for results, in which JSON has no infinity."""
    return loss if math.isfinite(loss) else None


class _Losses(Study[FinishSettings]):
    """Losses on the validation prompts, which were measured during training; no model is run."""

    name = "fit"
    Settings: ClassVar[type] = FinishSettings
    asks_of = "one"
    findings: Findings

    def run(self) -> Findings:
        """The rows and the table of the losses."""
        return self.findings
