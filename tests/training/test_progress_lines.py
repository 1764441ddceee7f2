"""The progress of a training is said in lines where output goes to a file."""

import io
import re

import pytest
from lightning.pytorch.callbacks import Callback, RichProgressBar

from oa_train.cli.bars import track
from oa_train.training import progress_lines
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from oa_train.training.progress_lines import TrainingLines, training_bar
from tests.builders import quiet_trainer, small_ioi


class Slow(Callback):
    """Makes every step of a training take so many seconds of the clock."""

    def __init__(self, seconds: float, now: list[float]) -> None:
        self.seconds, self.now = seconds, now

    def on_train_batch_start(self, *_):
        self.now[0] += self.seconds


def lines(capsys, monkeypatch, seconds: float, **options) -> list[str]:
    """What a training prints on stderr whose steps take so many seconds."""
    now = [0.0]
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now[0])
    callbacks = [Slow(seconds, now), TrainingLines(track)]
    trainer = quiet_trainer(**{"max_steps": 15, "enable_progress_bar": True, "callbacks": callbacks} | options)
    trainer.fit(CircuitModule(), datamodule=TaskData(small_ioi(n_validation=8, n_means=8, batches_per_epoch=5)))
    said = capsys.readouterr().err
    assert "\r" not in said
    assert "\x1b" not in said
    return [line for line in said.splitlines() if line.startswith("training: ")]


def test_a_line_after_ten_seconds_and_then_one_a_minute(capsys, monkeypatch):
    first, second, third, last = lines(capsys, monkeypatch, 12)
    numbers = r"train/loss \S+, train/kl \S+, train/size \S+"
    assert re.fullmatch(rf"training: step 1 of 15, {numbers}, 3 min left", first)
    assert re.fullmatch(rf"training: step 6 of 15, {numbers}, val/size 15, val/kl \S+, 2 min left", second)
    assert re.fullmatch(rf"training: step 11 of 15, {numbers}, val/size 15, val/kl \S+, 48 s left", third)
    assert re.fullmatch(rf"training: 15 steps in 3 min, {numbers}, val/size 15, val/kl \S+", last)


def test_a_short_training_has_one_line_and_one_without_end_no_remaining_time(capsys, monkeypatch):
    (line,) = lines(capsys, monkeypatch, 0.5)
    assert line.startswith("training: 15 steps in 8 s, ")
    stop = {"max_steps": -1, "max_epochs": -1, "max_time": {"seconds": 0}, "min_epochs": 1}
    first, *_ = lines(capsys, monkeypatch, 20, **stop)
    assert re.fullmatch(r"training: step 1, train/loss \S+, train/kl \S+, train/size \S+", first)


def test_accumulated_batches_are_one_step(capsys, monkeypatch):
    first, *_ = lines(capsys, monkeypatch, 12, max_steps=-1, max_epochs=2, accumulate_grad_batches=2)
    assert re.match(r"training: step 1 of 6, .* 2 min left", first)


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, RichProgressBar), (False, TrainingLines)])
def test_a_terminal_gets_a_bar(monkeypatch, is_terminal, kind):
    output = io.StringIO()
    output.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stdout", output)
    assert type(training_bar(track)) is kind


def test_numbers_are_written_as_a_person_would():
    assert [*map(progress_lines._number, (0.12345, 11.147, 70651.2, 0.0))] == ["0.123", "11.1", "70,651", "0"]
