"""Callbacks of a training run: checkpoints that survive a kill, and figures of the masks."""

import shutil
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from oa_train.checks import check_at_least
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.mask_figures import score_picture

# Settings in which two runs must agree for their objectives to be comparable.
_OBJECTIVE = ("penalty", "target_size", "threshold")


class BestCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/best.ckpt`, the state with the lowest `val/objective`, across resumes.

    A resumed run writes to its own folder. The best checkpoint of the earlier run is copied there, so that the best of
    the whole training is kept, as it would be without the interruption.

    Args:
        folder: where `best.ckpt` is kept.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="val/objective",
            mode="min",
            # Save right after the validation: a resume from a checkpoint at the end of an epoch skips a batch.
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._earlier: Path | None = None
        self._is_global_zero = True
        self._resumed_step = 0

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember where the resumed run keeps its best checkpoint."""
        changed = any(change.startswith(_OBJECTIVE) for change in pl_module.changed_settings(checkpoint))
        resumes = trainer.state.fn == TrainerFn.FITTING and not changed
        self._earlier = Path(trainer.ckpt_path).parent / "best.ckpt" if resumes else None
        self._resumed_step = checkpoint["global_step"]
        self._is_global_zero = trainer.is_global_zero

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the resumed run's best checkpoint, unless it is from a later step than the resume."""
        if self._earlier is None or self.dirpath is None:
            return
        if not self._earlier.is_file():
            if state_dict["best_model_path"]:
                rank_zero_warn(f"There is no {self._earlier}, so the best is chosen among later validations alone.")
            return
        earlier = read_checkpoint(self._earlier)
        # A better checkpoint from after the resumed step is reached again if the settings are the same; if they are
        # not, it does not belong to this run.
        if earlier["global_step"] > self._resumed_step or self.state_key not in earlier["callbacks"]:
            return
        copied = Path(self.dirpath) / "best.ckpt"
        if self._is_global_zero:
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._earlier, copied)
        # Take the score from best.ckpt itself: `state_dict` can date from before a validation at the same step.
        score, path = earlier["callbacks"][self.state_key]["best_model_score"], str(copied)
        moved = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
        taken_over = {"best_model_score": score, "kth_value": score, "best_k_models": {path: score}}
        super().load_state_dict(state_dict | moved | taken_over)


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt`: written every few steps and at the end, so that a kill loses little.

    Like all checkpoint callbacks of Lightning it runs after the others. List it after `BestCheckpoint`, so that
    `last.ckpt` never includes a validation that `best.ckpt` does not.

    Args:
        folder: where `last.ckpt` is kept.
        every_n_steps: optimiser steps between two writes.

    Raises:
        ConfigurationError: `every_n_steps` is not at least 1.
    """

    def __init__(self, folder: Path, every_n_steps: int = 25) -> None:
        check_at_least(1, every_n_steps=every_n_steps)
        self._path = folder / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._step = 0
        self._saved_at = -1
        self._due = False
        self._is_watched = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count from the resumed step, and watch for the deletion of the folder from now on."""
        self._step = trainer.global_step
        writer = trainer.strategy.checkpoint_io
        if trainer.is_global_zero and isinstance(writer, WholeFileCheckpointIO):
            writer.make_folder(self._path.parent)
            self._is_watched = True

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Write every `every_n_steps` steps, and when `max_steps` or `max_epochs` is reached.

        Training can be extended from a checkpoint written here; once it has ended, Lightning counts the epoch as
        complete, and a resume would skip a batch. If a validation follows, the checkpoint is written after it, because
        a resume would otherwise skip the validation. Nothing is written while gradients are accumulated: those of
        several processes are stored as their mean, which rounds.
        """
        step = trainer.global_step
        stepped, self._step = step != self._step, step
        due = step % self.every_n_steps == 0 or _is_last_step(trainer) or self._is_deleted(trainer)
        self._due = stepped and due
        if self._due and not validation_follows(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the checkpoint that was due before the validation."""
        if self._due and not trainer.sanity_checking:
            self.save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the final state."""
        self.save(trainer)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the state of a run that was already complete when resumed, and so took no step."""
        if trainer.ckpt_path is not None and self._saved_at < 0:
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        """Write the state, at most once per step; all processes must take part."""
        self._due = False
        if trainer.global_step != self._saved_at:
            self._saved_at = trainer.global_step
            trainer.save_checkpoint(self._path)

    def _is_deleted(self, trainer: lightning.Trainer) -> bool:
        """True if the folder was deleted: the state is then written at once, which ends the run.

        Several processes would have to agree on this; they notice at the next regular write.
        """
        return self._is_watched and trainer.world_size == 1 and not self._path.parent.is_dir()


def _is_last_step(trainer: lightning.Trainer) -> bool:
    ends_with_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or ends_with_epoch


def validation_follows(trainer: lightning.Trainer) -> bool:
    """True if a validation follows the training batch that has just ended.

    A resume from a checkpoint between the two would skip the validation.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


class MaskImages(Callback):
    """Logs the keep-probability of every mask entry as an image for TensorBoard after each validation."""

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw and log the map."""
        if trainer.sanity_checking or not isinstance(pl_module, CircuitModule) or not trainer.is_global_zero:
            return
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        masks = pl_module.masks
        for number, scores in enumerate(masks.keep_probability() if loggers else ()):
            figure = score_picture(pl_module.level, scores, masks.threshold)
            name = "masks/keep_probability" + (f"/{number}" if pl_module.n_circuits > 1 else "")
            for logger in loggers:
                logger.experiment.add_figure(name, figure, trainer.global_step)
