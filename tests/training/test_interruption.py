"""A signal ends a training at a whole step, wherever it comes, and what is resumed ends as if nothing had happened."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)

from oa_train.errors import CheckpointError, ConfigurationError
from oa_train.models.spec import LMSpec
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.data import TaskData
from oa_train.training.interruption import StopAtSignal, Stopped
from tests.builders import quiet_trainer, small_ioi

BATCHES, EPOCHS = 4, 2

MODULES = {
    "circuit": lambda: CircuitModule(lm=LMSpec(), penalty_weight=0.12),
    "constants": lambda: ConstantsModule(lm=LMSpec(), alone="m*"),
}


def send() -> None:
    signal.raise_signal(signal.SIGTERM)


def fail() -> None:
    raise ZeroDivisionError


def interrupt() -> None:
    raise KeyboardInterrupt


class At(Callback):
    """Does something once, when a hook is reached after so many batches have begun."""

    def __init__(self, hook: str, batch: int = 0, act: Callable[[], None] = send) -> None:
        self.hook = hook
        self.batch = batch
        self.act = act
        self.begun = 0

    def reach(self, hook: str) -> None:
        if hook == self.hook and self.begun >= self.batch:
            self.hook = "done"
            self.act()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.reach("on_fit_start")

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun += 1
        self.reach("on_train_batch_start")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.reach("on_validation_start")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.reach("on_fit_end")


def train(
    folder: Path,
    *callbacks: Callback,
    resume: Path | None = None,
    kind: str = "circuit",
    batches: int = BATCHES,
    **options: Any,
) -> CircuitModule | ConstantsModule:
    module, last = MODULES[kind](), LastCheckpoint(folder, every_n_steps=1)
    trainer = quiet_trainer(
        **{"max_epochs": EPOCHS} | options,
        enable_checkpointing=True,
        callbacks=[*callbacks, BestCheckpoint(folder), last, StopAtSignal(last)],
        plugins=[WholeFileCheckpointIO()],
    )
    data = TaskData(small_ioi(batches_per_epoch=batches, n_validation=8))
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    return module


def stopped(folder: Path, at: At, *callbacks: Callback, **options: Any) -> int:
    """Train until a signal ends it, and return how many batches had begun."""
    with pytest.raises(Stopped) as stop:
        train(folder, at, *callbacks, **options)
    assert (stop.value.code, stop.value.signal) == (143, signal.SIGTERM)
    return at.begun


def assert_same(resumed: Path, uninterrupted: Path) -> None:
    ended, expected = (read_checkpoint(path) for path in (resumed, uninterrupted))
    assert ended["global_step"] == expected["global_step"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(ended["state_dict"][name], value), name


# What is trained, options of the trainer, and after which batch a signal ends it that comes in which batch. With
# accumulation an epoch of four batches has two steps, after the third batch and the fourth.
TRAININGS: dict[str, tuple[str, dict[str, Any], dict[int, int]]] = {
    "circuit": ("circuit", {}, {1: 1, 4: 4, 8: 8}),
    "accumulated": ("circuit", {"accumulate_grad_batches": 3}, {1: 3, 4: 4}),
    "validated while accumulating": ("circuit", {"val_check_interval": 2, "accumulate_grad_batches": 4}, {2: 4}),
    "validated often": ("circuit", {"val_check_interval": 2}, {6: 6}),
    "constants": ("constants", {}, {3: 3}),
}


@pytest.mark.parametrize("training", TRAININGS)
def test_a_training_ends_after_the_step_of_its_signal_and_is_resumed_bit_for_bit(tmp_path, training):
    kind, options, ends = TRAININGS[training]
    whole = tmp_path / "whole"
    train(whole, kind=kind, **options)
    for batch, end in ends.items():
        first, second = tmp_path / f"first_{batch}", tmp_path / f"second_{batch}"
        assert stopped(first, At("on_train_batch_start", batch), kind=kind, **options) == end
        train(second, resume=first / "last.ckpt", kind=kind, **options)
        assert_same(second / "last.ckpt", whole / "last.ckpt")
        # No validation is left out.
        assert_same(second / "best.ckpt", whole / "best.ckpt")


def test_a_signal_during_a_validation_ends_the_training_after_it(tmp_path):
    assert stopped(tmp_path, At("on_validation_start")) == BATCHES
    assert read_checkpoint(tmp_path / "best.ckpt")["global_step"] == BATCHES
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == BATCHES


def test_the_best_checkpoint_is_resumed_bit_for_bit(tmp_path):
    train(tmp_path / "part", max_steps=BATCHES)
    train(tmp_path / "whole")
    train(tmp_path / "resumed", resume=tmp_path / "part" / "best.ckpt")
    assert_same(tmp_path / "resumed" / "last.ckpt", tmp_path / "whole" / "last.ckpt")


def test_a_finished_training_is_gone_on_from_bit_for_bit(tmp_path):
    """However often a checkpoint is written."""
    module, last = MODULES["circuit"](), LastCheckpoint(tmp_path / "part", every_n_steps=1000)
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[last])
    trainer.fit(module, TaskData(small_ioi(batches_per_epoch=BATCHES, n_validation=8)))
    train(tmp_path / "whole")
    train(tmp_path / "resumed", resume=tmp_path / "part" / "last.ckpt")
    assert_same(tmp_path / "resumed" / "last.ckpt", tmp_path / "whole" / "last.ckpt")


# Callbacks with a state that Lightning puts back only in part, and in which batch the signal comes.
CALLBACKS: dict[str, tuple[Callable[[], Callback], int]] = {
    "early stopping at the end of an epoch": (lambda: EarlyStopping("val/objective"), 4),
    "accumulation by epoch": (lambda: GradientAccumulationScheduler({0: 3, 1: 2}), 2),
    "averages": (lambda: WeightAveraging(use_buffers=False), 4),
    "moving averages": (lambda: EMAWeightAveraging(decay=0.5, use_buffers=False), 6),
}


@pytest.mark.filterwarnings("ignore:.*(WeightAveraging callback with a model that overrides|reduce the number of)")
@pytest.mark.filterwarnings("ignore:.*overriding `LightningModule.optimizer_")
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_resume_is_exact_beside_callbacks_of_lightning(tmp_path, name):
    made, batch = CALLBACKS[name]
    train(tmp_path / "whole", made())
    stopped(tmp_path / "first", At("on_train_batch_start", batch), made())
    train(tmp_path / "second", made(), resume=tmp_path / "first" / "last.ckpt")
    assert_same(tmp_path / "second" / "last.ckpt", tmp_path / "whole" / "last.ckpt")
    assert_same(tmp_path / "second" / "best.ckpt", tmp_path / "whole" / "best.ckpt")


@pytest.mark.parametrize("kind", MODULES)
def test_the_best_checkpoint_is_resumed_bit_for_bit_among_accumulated_batches(tmp_path, kind):
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": 4, "batches": 8, "kind": kind}
    train(tmp_path / "whole", **options)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "part", At("on_train_batch_start", 5, fail), **options)
    assert read_checkpoint(tmp_path / "part" / "best.ckpt")["global_step"] == 1
    train(tmp_path / "resumed", resume=tmp_path / "part" / "best.ckpt", **options)
    assert_same(tmp_path / "resumed" / "last.ckpt", tmp_path / "whole" / "last.ckpt")


def test_an_early_stop_holds_across_a_resume(tmp_path):
    def stopping() -> Callback:
        return EarlyStopping("val/objective", patience=1, min_delta=100.0)

    train(tmp_path / "first", stopping(), val_check_interval=2)
    train(tmp_path / "second", stopping(), val_check_interval=2, resume=tmp_path / "first" / "last.ckpt")
    assert read_checkpoint(tmp_path / "second" / "last.ckpt")["global_step"] == 4


def test_a_resume_of_a_complete_training_has_the_last_checkpoint_too(tmp_path):
    train(tmp_path / "first", max_steps=3)
    train(tmp_path / "second", max_steps=3, resume=tmp_path / "first" / "last.ckpt")
    train(tmp_path / "third", resume=tmp_path / "second" / "last.ckpt")
    train(tmp_path / "whole")
    assert_same(tmp_path / "third" / "last.ckpt", tmp_path / "whole" / "last.ckpt")


def test_a_resume_in_epochs_of_another_length_is_refused(tmp_path):
    train(tmp_path / "first", max_steps=4)
    with pytest.raises(CheckpointError, match="in epochs of 4 batches; this configuration has epochs of 3"):
        train(tmp_path / "second", resume=tmp_path / "first" / "last.ckpt", batches=3)


def test_a_best_checkpoint_that_is_gone_is_missed_aloud(tmp_path):
    train(tmp_path / "first", max_epochs=1)
    (tmp_path / "first" / "best.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"There is no .*best\.ckpt, so the best is chosen among later validations"):
        train(tmp_path / "second", resume=tmp_path / "first" / "last.ckpt")


def test_a_resume_that_is_not_exact_says_so(tmp_path):
    def averaging() -> Callback:
        return StochasticWeightAveraging(0.01, swa_epoch_start=1)

    train(tmp_path / "first", averaging(), max_epochs=1)
    with pytest.warns(UserWarning, match="with StochasticWeightAveraging is not exact"):
        train(tmp_path / "second", averaging(), resume=tmp_path / "first" / "last.ckpt")


@pytest.mark.filterwarnings("ignore:.*(WeightAveraging callback|callbacks used to create the checkpoint)")
def test_a_run_with_averages_is_tested_by_them_and_leaves_the_frozen_model_alone(tmp_path):
    module = train(tmp_path, EMAWeightAveraging(decay=0.9, use_buffers=False))
    stored = read_checkpoint(tmp_path / "last.ckpt")
    assert not torch.equal(
        stored["state_dict"]["masks.distribution.logits"], stored["current_model_state"]["masks.distribution.logits"]
    )
    fresh = MODULES["circuit"]()
    assert all(map(torch.equal, module.frozen.parameters(), fresh.frozen.parameters()))
    for callbacks in ([EMAWeightAveraging(use_buffers=False)], []):
        trainer = quiet_trainer(callbacks=callbacks)
        trainer.test(fresh, TaskData(small_ioi()), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
        assert torch.equal(fresh.masks.distribution.logits, stored["state_dict"]["masks.distribution.logits"])


UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "interval": ("circuit", {"val_check_interval": 0}, "val_check_interval is 0; expected more"),
    "epochs": ("constants", {"check_val_every_n_epoch": 0}, "check_val_every_n_epoch is 0; expected more"),
    "buffers": ("circuit", {"callbacks": [WeightAveraging()]}, "set its use_buffers to false"),
    "averages": ("constants", {"callbacks": [WeightAveraging(use_buffers=False)]}, "leave WeightAveraging out"),
}


@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("name", UNFIT)
def test_options_of_the_trainer_that_cannot_work_are_refused(name):
    kind, options, said = UNFIT[name]
    with pytest.raises(ConfigurationError, match=said):
        quiet_trainer(max_epochs=1, **options).fit(MODULES[kind](), TaskData(small_ioi()))


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"limit_train_batches": 0}])
def test_a_training_of_no_steps_trains_nothing(tmp_path, options):
    assert train(tmp_path, kind="constants", **options).stale == 0


def test_a_resumed_run_writes_nothing_before_it_has_completed_a_step(tmp_path):
    options = {"accumulate_grad_batches": 2}
    first, second = tmp_path / "first", tmp_path / "second"
    assert stopped(first, At("on_train_batch_start", 1), **options) == 2
    with pytest.raises(ZeroDivisionError):
        train(second, At("on_train_batch_start", 2, fail), resume=first / "last.ckpt", **options)
    assert not (second / "last.ckpt").exists()


def test_a_single_process_ends_at_once_while_it_prepares(tmp_path):
    assert stopped(tmp_path, At("on_fit_start")) == 0
    assert not (tmp_path / "last.ckpt").exists()


@pytest.fixture
def handler():
    """A handler of SIGTERM that the caller of a training has set, and that is set again afterwards."""

    def heard(number: int, frame: Any) -> None:
        heard_numbers.append(number)

    heard_numbers: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, heard)
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


ENDS: dict[str, tuple[Callable[[], None] | None, type[BaseException] | None]] = {
    "in order": (None, None),
    "by a signal": (send, Stopped),
    "by an error": (fail, ZeroDivisionError),
    "by an interrupt": (interrupt, SystemExit),
}


@pytest.mark.parametrize(
    ("hook", "end"), [("on_fit_start", "by a signal"), *(("on_train_batch_start", end) for end in ENDS)]
)
def test_the_handler_from_before_is_back_however_the_training_ends(tmp_path, handler, hook, end):
    act, problem = ENDS[end]
    if act is None:
        train(tmp_path)
    else:
        with pytest.raises(problem):
            train(tmp_path, At(hook, act=act))
    assert signal.getsignal(signal.SIGTERM) is handler


def test_outside_the_main_thread_nothing_is_listened_to(tmp_path, handler):
    seen = []
    see = At("on_train_batch_start", act=lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=train, args=(tmp_path, see))
    thread.start()
    thread.join(timeout=120)
    assert seen == [handler]
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == BATCHES * EPOCHS


def test_a_signal_between_the_last_step_and_the_end_is_not_lost(tmp_path):
    assert stopped(tmp_path, At("on_fit_end")) == BATCHES * EPOCHS
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == BATCHES * EPOCHS
