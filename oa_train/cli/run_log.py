"""The log of a command: everything that it prints, with time stamps, in `run.log` of its run folder."""

import logging
import shlex
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

LOG_FILE = "run.log"

# Messages of this package; their only handler writes the log, because the terminal shows them already.
log = logging.getLogger("oa_train.log")

# Libraries whose notices are logged.
LIBRARIES = ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "huggingface_hub", "torch")


class Record(MemoryHandler):
    """Buffers messages until the run folder is known, then writes them there, and later messages at once."""

    def __init__(self) -> None:
        super().__init__(capacity=sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)
        self._latest: logging.LogRecord | None = None

    def write_to(self, folder: Path) -> None:
        """Write to `run.log` in a folder, appending to the output of earlier commands."""
        path = folder / LOG_FILE
        if isinstance(self.target, logging.FileHandler):
            if Path(self.target.baseFilename) == path.absolute():
                return
            self._close_target()
        target = logging.FileHandler(path, encoding="utf-8")
        # If the disk is full, lines are dropped: the terminal has shown them already.
        vars(target)["handleError"] = lambda record: None
        target.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self.setTarget(target)
        self.flushLevel = logging.NOTSET
        self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Emit a record only once, even if a library's loggers propagate it to each other."""
        if record is not self._latest:
            self._latest = record
            super().emit(record)

    def close(self) -> None:
        """Close the handler and its file."""
        self._close_target()
        super().close()

    def _close_target(self) -> None:
        with suppress(OSError):
            if self.target is not None:
                self.target.close()


@contextmanager
def recording(words: Sequence[str]) -> Iterator[None]:
    """Log a command line, its output, Python's warnings and errors in threads, until the command ends."""
    record = Record()
    loggers = [log, *(logging.getLogger(name) for name in LIBRARIES)]
    log.setLevel(logging.INFO)
    log.propagate = False
    for logger in loggers:
        logger.addHandler(record)
    log.info("%s", shlex.join(["oa-train", *words]))
    try:
        threading.excepthook = _thread_ended
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        threading.excepthook = threading.__excepthook__
        for logger in loggers:
            logger.removeHandler(record)
        record.close()


def record_in(folder: Path) -> None:
    """Write the log of the running command to `run.log` in a folder; nothing happens outside a command."""
    for handler in log.handlers:
        if isinstance(handler, Record):
            with suppress(OSError):  # a command may also read from a folder that is read-only
                handler.write_to(folder)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    sys.stderr.write(f"oa-train: warning: {message}\n")
    log.warning("%s (%s, %s:%d)", message, category.__name__, filename, lineno)


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Log an error that has ended a thread, and warn of it.

    TensorBoard writes in a thread; its error is raised again when the writer is used next.
    """
    problem = ended.exc_value
    if problem is None or isinstance(problem, SystemExit):
        return
    message = f"{ended.thread.name if ended.thread else 'A thread'} has ended: {type(problem).__name__}: {problem}"
    if not isinstance(problem, OSError):
        sys.stderr.write(f"oa-train: warning: {message}\n")
    log.warning("%s", message, exc_info=problem)
