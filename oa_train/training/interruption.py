"""Ending training in an orderly way: after a whole step, in all processes, with a checkpoint of that step."""

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from oa_train.errors import TERMINATED
from oa_train.training.callbacks import LastCheckpoint, validation_follows

# Seconds that the first process waits for those that it has started, once all have agreed to end.
SECONDS_TO_END = 30.0

# The same after an error in the first process. Meanwhile other processes that failed can report it; one that waits for
# the first process in a collective operation would wait forever.
SECONDS_AFTER_A_FAULT = 2.0

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class Stopped(SystemExit):
    """A signal has ended training; the exit status is 143.

    Args:
        number: the signal.

    Attributes:
        signal: the signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(TERMINATED)
        self.signal = number


class StopAtSignal(Checkpoint):
    """Ends training in an orderly way when one of its processes gets a signal.

    A handler only records the signal. At the end of the next batch that completed an optimiser step, or after the
    validation that follows it, all processes learn whether any has recorded one. Then all write `last.ckpt` together
    and raise `Stopped`; a resume continues bit for bit. Before training begins there is nothing to write: a single
    process ends at once, several end when all are ready to begin.

    Meanwhile Lightning's own handlers of these signals are disabled: they would communicate with other processes at
    any point, and write nothing. The previous handlers are restored when training ends, however it ends. Only
    processes of an external launcher ignore the signals once they have agreed to end: torchrun and srun send SIGTERM
    to all as soon as one has ended.

    As a checkpoint callback it runs after all others. List it last.

        last = LastCheckpoint(folder)
        trainer = lightning.Trainer(callbacks=[BestCheckpoint(folder), last, StopAtSignal(last)])

    Args:
        last: writes the checkpoint.
        signals: signals that end training; if several are received, the last in this list counts.
    """

    def __init__(self, last: LastCheckpoint, signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> None:
        self._last = last
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Handler] = {}
        self._forget()

    def _forget(self) -> None:
        self._noted = 0  # position in the list of signals, counted from 1
        self._at_once = False
        self._step = 0
        self._whole_step = False
        self._deaf = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Install the handlers, before the module prepares anything."""
        if stage != "fit" or threading.current_thread() is not threading.main_thread():
            return
        self._forget()
        self._at_once = trainer.world_size == 1
        self._listen()
        self._displace_lightning(trainer)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End here if a signal came during the preparation."""
        self._at_once = False
        self._step = trainer.global_step
        self._end_if_agreed(trainer, save=False)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """End here if a signal came, unless gradients are being accumulated or a validation belongs to this step."""
        self._whole_step, self._step = trainer.global_step != self._step, trainer.global_step
        if self._whole_step and not validation_follows(trainer):
            self._end_if_agreed(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End here if a signal came, unless gradients are being accumulated."""
        if self._whole_step and not trainer.sanity_checking:
            self._end_if_agreed(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End here if a signal came, before the trained circuits are finished."""
        self._end_if_agreed(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Restore the previous handlers.

        Raises:
            Stopped: a signal came after the last step. The other processes have nothing left to do.
        """
        late = self._noted
        self._leave(trainer)
        if late and trainer.is_global_zero:
            raise Stopped(self._signals[late - 1])

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Restore the previous handlers, and end the child processes.

        A process of an external launcher keeps ignoring signals: it still has to report why it ends.
        """
        if not isinstance(exception, KeyboardInterrupt):  # which Lightning handles
            children = _take_children(trainer)
            self._deaf = self._deaf or (trainer.world_size > 1 and not children)
            _wait_for(children, SECONDS_AFTER_A_FAULT)
        self._leave(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = max(self._noted, 1 + self._signals.index(signal.Signals(number)))
        if self._at_once:
            self._at_once = False
            raise Stopped(signal.Signals(number))

    def _listen(self) -> None:
        for number in self._signals:
            self._before.setdefault(number, signal.signal(number, self._note))

    def _displace_lightning(self, trainer: lightning.Trainer) -> None:
        """Keep Lightning from setting its own handlers for these signals, and from resetting them at teardown."""
        connector = trainer._signal_connector
        register = connector.register_signal_handlers

        def register_others() -> None:
            register()
            for number in self._signals:
                connector._original_handlers.pop(number, None)
            self._listen()

        vars(connector)["register_signal_handlers"] = register_others

    def _leave(self, trainer: lightning.Trainer) -> None:
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
        for number, before in self._before.items():
            # None means a handler that was not set from Python, and cannot be restored from there either.
            signal.signal(number, signal.SIG_IGN if self._deaf else signal.SIG_DFL if before is None else before)
        self._before.clear()
        self._forget()

    def _end_if_agreed(self, trainer: lightning.Trainer, *, save: bool = True) -> None:
        noted = self._noted
        if trainer.world_size > 1:  # the same in all processes, because they check at the same point
            here = torch.tensor(noted, device=trainer.strategy.root_device)
            noted = int(trainer.strategy.reduce(here, reduce_op="max"))
        if not noted:
            return
        children = _take_children(trainer)
        if save:
            self._last.save(trainer)
        _wait_for(children)
        self._deaf = trainer.world_size > 1 and not children
        raise Stopped(self._signals[noted - 1])


@contextmanager
def terminable(signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> Iterator[None]:
    """Raise `Stopped` at a signal inside the context, as Python raises at Ctrl-C but not at SIGTERM."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise Stopped(signal.Signals(number))

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in signals} if is_main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def none_left_behind(trainer: lightning.Trainer) -> Iterator[None]:
    """Make the first process outlive its child processes while they work together outside training.

    Lightning would kill it as soon as a child fails, before it could say how to resume, and would leave the children
    running if it fails itself.
    """
    children = _take_children(trainer)
    try:
        yield
    except BaseException:
        _wait_for(children, SECONDS_AFTER_A_FAULT)
        raise
    _wait_for(children)


def _take_children(trainer: lightning.Trainer) -> list[subprocess.Popen[bytes]]:
    """Take over the child processes that Lightning has started; an empty list in all other processes.

    A thread of Lightning kills this process when a child ends with a non-zero status, which the children are about to
    do on purpose. The thread shares the list, and ends when it is empty.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    children = list(launcher.procs)
    launcher.procs.clear()
    return children


def _wait_for(children: Sequence[subprocess.Popen[bytes]], seconds: float = SECONDS_TO_END) -> None:
    """Wait for processes to end; kill those that do not."""
    for child in children:
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
