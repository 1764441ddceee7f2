"""Lightning datamodule for any task, resumable at any batch."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import lightning

from oa_train.batches import Batch
from oa_train.errors import ConfigurationError
from oa_train.tasks.task import Stream, Task


class PromptLoader:
    """Training batches in order: every epoch continues where the previous one ended.

    Lightning stores `state_dict` in its checkpoints, so a resumed run continues at the very next batch, even in the
    middle of an epoch. Prompts are made from their numbers. A process takes every `world_size`-th batch. An epoch has
    `epoch_length` batches, by default as many as the task says.
    """

    def __init__(self, task: Task, rank: int = 0, world_size: int = 1, epoch_length: int | None = None) -> None:
        self._task = task
        self._epoch_length = task.batches_per_epoch if epoch_length is None else epoch_length
        self._rank = rank
        self._world_size = world_size
        self._batches = 0
        self._batches_in_epoch = 0
        self._resumed = False

    def __len__(self) -> int:
        return self._epoch_length

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._batches_in_epoch = 0
        self._resumed = False
        while self._batches_in_epoch < len(self):
            number = self._batches * self._world_size + self._rank
            self._batches += 1
            self._batches_in_epoch += 1
            yield self._task.batch("train", number)

    def state_dict(self) -> dict[str, int]:
        """Batches seen by each process, in total and in this epoch, and the number of processes."""
        return {"given": self._batches, "given_in_epoch": self._batches_in_epoch, "world_size": self._world_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that `state` counts, over all its processes."""
        self._batches = math.ceil(state["given"] * state.get("world_size", self._world_size) / self._world_size)
        # A checkpoint at the end of an epoch is resumed with a fresh one.
        self._batches_in_epoch = state["given_in_epoch"] % len(self)
        self._resumed = True


class EvaluationLoader:
    """Fixed batches of an epoch; a class of its own because Lightning reads a list as several loaders."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class TaskData(lightning.LightningDataModule):
    """The streams of a task as Lightning's train, validation and test data."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def train_dataloader(self) -> PromptLoader:
        """Batches of the train stream; epochs of the loader and trainer end together, on which resuming relies."""
        return PromptLoader(self.task, *self._rank_and_world_size(), self.epoch_length)

    @property
    def epoch_length(self) -> int:
        """Number of training batches of an epoch in each process, as limited by the attached trainer."""
        length = self.task.batches_per_epoch
        limit = getattr(self.trainer, "limit_train_batches", None)
        if isinstance(limit, int):
            return min(length, limit)
        return int(length * limit) if isinstance(limit, float) else length

    def val_dataloader(self) -> EvaluationLoader:
        """The validation prompts of this process."""
        return self._share("validation", self.task.n_validation)

    def test_dataloader(self) -> EvaluationLoader:
        """The test prompts of this process; predictions are made on them as well."""
        return self._share("test", self.task.n_test)

    predict_dataloader = test_dataloader

    def _share(self, stream: Stream, n_prompts: int) -> EvaluationLoader:
        rank, world_size = self._rank_and_world_size()
        if n_prompts < world_size:
            raise ConfigurationError(f"{n_prompts} {stream} prompts cannot be split among {world_size} processes.")
        # The same number of batches for each process, because all processes run a sharded model together.
        n_batches = math.ceil(n_prompts / (world_size * self.task.evaluation_batch_size))
        n_batches = min(n_batches, n_prompts // world_size) * world_size
        bounds = [n_prompts * number // n_batches for number in range(n_batches + 1)]
        parts = list(itertools.pairwise(bounds))[rank::world_size]
        return EvaluationLoader([self.task.batch_of(stream, range(*part)) for part in parts])

    def _rank_and_world_size(self) -> tuple[int, int]:
        trainer: Any = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
