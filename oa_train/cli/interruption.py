"""What a run that is interrupted leaves its user with: the command that goes on from there."""

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from oa_train.cli.arguments import CONFIG_FILE
from oa_train.errors import TERMINATED


def resume_command(run: Path) -> str:
    """The command that resumes or finishes a run, ready to be pasted into a shell."""
    config, checkpoint = run / CONFIG_FILE, run / "checkpoints" / "last.ckpt"
    return f"oa-train fit --config {shlex.quote(str(config))} --ckpt_path {shlex.quote(str(checkpoint))}"


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """Have an interruption say how the run goes on.

    Args:
        run: run folder.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        last = run / "checkpoints" / "last.ckpt"
        if last.is_file():
            stop.add_note(f"Nothing up to {last} is lost. This goes on from there, in a new version of the run:")
            stop.add_note(f"  {resume_command(run)}")
        else:
            stop.add_note(f"No checkpoint had been written yet. This starts again:\n  {_start_command(run)}")
        raise


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM end what runs inside in order, like Ctrl-C; by itself Python just dies of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise SystemExit(TERMINATED)


def _start_command(run: Path) -> str:
    return f"oa-train fit --config {shlex.quote(str(run / CONFIG_FILE))}"
