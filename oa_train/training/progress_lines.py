"""Training progress in lines, for output to a file."""

import math
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.console import Console

from oa_train.progress import BETWEEN_LINES, Track, duration
from oa_train.training.steps import planned_steps

# Seconds of training before the first line, which estimates the duration.
BEFORE_FIRST_LINE = 10.0


def training_bar(track: Track) -> ProgressBar:
    """A bar on a terminal, lines elsewhere."""
    return RichProgressBar() if Console().is_terminal else TrainingLines(track)


class TrainingLines(ProgressBar):
    """Prints a line now and then, with the steps, the metrics that a bar would show, and the remaining time.

    Lightning's own bars repaint, which fills a file.

    Args:
        track: shows the lines.
    """

    def __init__(self, track: Track) -> None:
        super().__init__()
        self._track = track
        self._is_enabled, self._begun, self._next, self._first_step = True, 0.0, math.inf, 0

    def disable(self) -> None:
        """Print nothing; called in all processes except the first one."""
        self._is_enabled = False

    def enable(self) -> None:
        """Print lines."""
        self._is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begun, self._first_step = time.monotonic(), trainer.global_step
        self._next = self._begun + BEFORE_FIRST_LINE

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Print a line if it is time."""
        now, done = time.monotonic(), trainer.global_step - self._first_step
        if now < self._next or done < 1:
            return
        self._next = now + BETWEEN_LINES
        total = planned_steps(trainer, int(self.total_train_batches))
        ends = total > trainer.global_step and not math.isinf(total)
        left = (now - self._begun) / done * (total - trainer.global_step)
        of = f" of {total:,}" if ends else ""
        self._say(f"step {trainer.global_step:,}{of}", trainer, f"{duration(left)} left" if ends else "")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last line."""
        done = trainer.global_step - self._first_step
        self._say(f"{done:,} steps in {duration(time.monotonic() - self._begun)}", trainer, "")

    def _say(self, steps: str, trainer: Trainer, left: str) -> None:
        if self._is_enabled:
            metrics = [f"{name} {_number(value)}" for name, value in trainer.progress_bar_metrics.items()]
            self._track.say(f"training: {', '.join(filter(None, [steps, *metrics, left]))}")


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
