"""The end of training constants alone: they are written, and evaluated on held-out prompts."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.figures.comparison import Panel, comparison_figure
from oa_train.models.frozen import CausalLM
from oa_train.progress import Stage, Track, silent
from oa_train.studies.comparison_tables import most_listed
from oa_train.studies.finish_circuits import Evaluate, Finished, FinishSettings
from oa_train.studies.study import MOST_LISTED, Findings, Row, Study, Table, estimates
from oa_train.tasks.task import Task


def finish_constants(
    model: CausalLM, task: Task, circuits: Sequence[TrainedCircuit], run: str | Path, track: Track = silent
) -> Finished:
    """Write `constants/`, `circuit/` if they belong to one, and `studies/fit_K/` to a run folder.

    `circuits` are from `ConstantsModule.trained_circuits`; their constants were trained on the task.
    """
    first, run = circuits[0], Path(run)
    is_circuit = first.name == "circuit"
    if is_circuit:
        first.save_circuit(run)
    first.save_constants(run)
    study = (Evaluate if is_circuit else EvaluateAlone)(model, task, circuits, track=track)
    return Finished(list(circuits), study.run_in(run))


class EvaluateAlone(Study[FinishSettings]):
    """Evaluates components that are each ablated alone with trained constants.

    Rows: one for each component, with the measures.
    """

    name = "fit"
    Settings: ClassVar[type] = FinishSettings
    asks_of = "several"

    def plan(self) -> list[Stage]:
        """A single stage, for all components."""
        return [Stage("evaluating the constants", len(self.circuits) * self.task.n_test)]

    def run(self) -> Findings:
        """Ablate each component in turn."""
        level, constants = self.circuits[0].circuit.level, self.circuits[0].constants
        assert constants is not None
        masks = torch.stack([trained.circuit.mask for trained in self.circuits])
        rows_per_run = self.settings.refit.rows_per_run
        behaviour = self.behaviour(level, masks, [constants], "the constants", rows_per_run)
        rows: list[Row] = [
            {"component": trained.name, "ablation": "optimal", **estimates(behaviour, number)}
            for number, trained in enumerate(self.circuits)
        ]
        title = f"KL divergence in nats with one component ablated, on {self.prompts}"
        cells = [{"component": row["component"], "mean ± 95 % interval": row["kl"]} for row in rows]
        cells = sorted(cells, key=lambda cell: -cell["mean ± 95 % interval"].mean)[:MOST_LISTED]
        names, kl = [row["component"] for row in rows], [row["kl"] for row in rows]
        panel = Panel("one component ablated", names, {"optimal": kl}, ranked=True)
        return Findings(
            rows,
            facts={"ablation": "optimal"},
            shown=[Table(most_listed(title, len(rows)), cells)],
            figures={"components": partial(comparison_figure, [panel], self.subject)},
            table="constants",
        )
