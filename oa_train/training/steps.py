"""Arithmetic of optimiser steps: batches that are accumulated, and the steps of a whole training run."""

import math

from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def accumulated_in(trainer: Trainer, epoch: int) -> int:
    """Number of batches that are accumulated for one optimiser step in an epoch."""
    for callback in vars(trainer)["callbacks"]:
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def planned_steps(trainer: Trainer, epoch_length: int) -> float:
    """Number of optimiser steps of the whole training run, at least 1; infinite if nothing ends it.

    Lightning's own estimate would create the dataloader, at its beginning, before a checkpoint is restored.
    """
    by_epochs = math.inf
    if trainer.max_epochs not in (None, -1):
        in_epochs = [accumulated_in(trainer, epoch) for epoch in range(trainer.max_epochs)]
        by_epochs = sum(math.ceil(epoch_length / accumulated) for accumulated in in_epochs)
    return max(1, by_epochs if trainer.max_steps == -1 else min(by_epochs, trainer.max_steps))


def batches_of_step(trainer: Trainer, epoch_length: int, batch_idx: int) -> range:
    """Indices in the epoch of the batches that are accumulated in the same optimiser step as this batch."""
    accumulated = trainer.accumulate_grad_batches
    first = batch_idx - batch_idx % accumulated
    return range(first, min(first + accumulated, epoch_length))


def share_of_step(trainer: Trainer, epoch_length: int, batch_idx: int) -> float:
    """Factor on a batch's loss that makes the accumulated loss the mean over the batches of its step.

    Lightning divides by `accumulate_grad_batches`, even in a step that has fewer at the end of an epoch.
    """
    return trainer.accumulate_grad_batches / len(batches_of_step(trainer, epoch_length, batch_idx))
