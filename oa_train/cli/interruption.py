"""What a run that is interrupted leaves its user with: the command that goes on from there."""

import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from oa_train.cli.arguments import CONFIG_FILE
from oa_train.training.interruption import Stopped


def resume_command(run: Path, checkpoint: Path | None = None) -> str:
    """The command that resumes or finishes a run, ready to be pasted into a shell.

    Args:
        run: run folder.
        checkpoint: where it goes on; at its `last.ckpt` when not given.
    """
    config, checkpoint = run / CONFIG_FILE, checkpoint or run / "checkpoints" / "last.ckpt"
    return f"oa-train fit --config {shlex.quote(str(config))} --ckpt_path {shlex.quote(str(checkpoint))}"


@contextmanager
def resumable(run: Path, resumed_from: Path | None = None) -> Iterator[None]:
    """Have an interruption say how the run goes on.

    Args:
        run: run folder.
        resumed_from: checkpoint that this run itself goes on from.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        for line in way_on(run, resumed_from):
            stop.add_note(line)
        raise


def way_on(run: Path, resumed_from: Path | None = None) -> list[str]:
    """How a run that was cut off goes on, a line each.

    Args:
        run: run folder.
        resumed_from: checkpoint that this run itself goes on from.
    """
    folder = run / "checkpoints"
    # The best one is all that there is if the folder was deleted and the run ended while it wrote that one again.
    kept = next((path for path in (folder / "last.ckpt", folder / "best.ckpt") if path.is_file()), None)
    if kept is not None:
        said = f"Nothing up to {kept} is lost. This goes on from there, in a new version of the run:"
        return [said, f"  {resume_command(run, kept)}"]
    if resumed_from is not None:
        said = f"No checkpoint had been written yet. This goes on from {resumed_from} once more:"
        return [said, f"  {resume_command(run, resumed_from)}"]
    return ["No checkpoint had been written yet. This starts again:", f"  {_start_command(run)}"]


@contextmanager
def terminable(signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> Iterator[None]:
    """Have SIGTERM end what runs inside in order, like Ctrl-C; by itself Python just dies of it.

    Args:
        signals: what to end at.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _terminate) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    del frame
    raise Stopped(signal.Signals(number))


def _start_command(run: Path) -> str:
    return f"oa-train fit --config {shlex.quote(str(run / CONFIG_FILE))}"
