"""The ablation under which circuits are trained: constants that are trained or stored, or another ablation."""

import torch
from torch import nn

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.ablations.registry import AblationName, AblationSource, check_kind, check_suits
from oa_train.errors import ConfigurationError
from oa_train.models.levels import Level
from oa_train.shapes import Bool, Tensor
from oa_train.tasks.task import Task


class Replacements(nn.Module):
    """Replacements of ablated entries for several circuits; prepared with a task's prompts before they are used.

    Constants are trained at sites where an entry of the selection, which may be ablated, lies.

    Attributes:
        constants: constants of every circuit; None if the ablation has none.
        prepared: whether the constants are initialised; stored in checkpoints.
    """

    def __init__(
        self, kind: AblationName, level: Level, positions: int, n_circuits: int, selection: Bool[Tensor, " entry"]
    ) -> None:
        super().__init__()
        self.kind = check_kind("ablation", kind)
        self.constants: TrainableConstants | None = None
        if self.kind.constant:
            replaced = level.replaced(~selection.unsqueeze(0)) if self.kind.learned else {}
            trained = [site for site, units in replaced.items() if bool(units.any())]
            self.constants = TrainableConstants([Constants.zeros(level, positions)] * n_circuits, trained)
        self._other: Ablation | None = None
        self._task: Task | None = None
        self.prepared = nn.Buffer(torch.tensor(kind == "zero"))

    def is_prepared_for(self, task: Task) -> bool:
        """True if a checkpoint or an earlier call has prepared it."""
        return bool(self.prepared) if self.constants is not None else self._task is task

    def prepare(self, source: AblationSource) -> None:
        """Compute the statistics that the ablation needs on the task's `means` prompts."""
        if self.kind.partnered:
            task = source.task
            evaluated = (*task.batches("validation", task.n_validation), *task.batches("test", task.n_test))
            check_suits([self.kind.name], source, evaluated)
        made = self.kind.prepare(source)
        if self.constants is None:
            self._other, self._task = made.to(self.prepared.device), source.task
        else:
            assert isinstance(made, Constants)
            self.constants.load(made)
            self.prepared.fill_(True)

    def ablations(self) -> list[Ablation]:
        """An ablation for each circuit or one for all; gradients flow to constants that are trained.

        Raises:
            ConfigurationError: nothing has been fitted, validated or tested, so the ablation is not prepared.
        """
        if self.constants is not None:
            return [*self.constants.sets()]
        if self._other is None:
            raise ConfigurationError(
                f"The {self.kind.name} ablation is prepared with the task's prompts when a trainer fits, validates or "
                "tests; without one, use `ABLATION_KINDS` of oa_train.ablations.registry."
            )
        return [self._other]
