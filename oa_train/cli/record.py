"""The record of a command: everything that it says, with time stamps, in `run.log` of its run folder."""

import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

LOG_FILE = "run.log"

# What this package says itself; its only handler is the record, because the terminal has been written to already.
said = logging.getLogger("oa_train.said")

# Libraries whose notices are recorded.
LIBRARIES = ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "huggingface_hub", "torch")

_LINE = "%(asctime)s %(levelname)-7s %(message)s"


class Record(MemoryHandler):
    """Keeps what is said until the run folder is known, then writes it there, and every later line at once."""

    def __init__(self) -> None:
        super().__init__(capacity=sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)
        self._latest: logging.LogRecord | None = None

    def write_to(self, folder: Path) -> None:
        """Write to `run.log` in a folder, after what an earlier command wrote there."""
        path = folder / LOG_FILE
        if isinstance(self.target, logging.FileHandler):
            if Path(self.target.baseFilename) == path.absolute():
                return
            self.target.close()
        target = _LogFile(path, encoding="utf-8")
        target.setFormatter(logging.Formatter(_LINE))
        self.setTarget(target)
        self.flushLevel = logging.NOTSET
        self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record once, although a library's loggers may hand it on to each other."""
        if record is not self._latest:
            self._latest = record
            super().emit(record)

    def close(self) -> None:
        """Close the file as well."""
        if self.target is not None:
            self.target.close()
        super().close()


class _LogFile(logging.FileHandler):
    """Keeps quiet when the disk is full: what it cannot take has been said on the terminal already."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the library's name)
        del record

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def recording(words: Sequence[str]) -> Iterator[None]:
    """Record what a command says, Python's warnings and errors of threads included; nothing of it is left behind.

    Args:
        words: the command line, which is the first line of the record.
    """
    record = Record()
    loggers = [said, *(logging.getLogger(name) for name in LIBRARIES)]
    said.setLevel(logging.INFO)
    said.propagate = False
    for logger in loggers:
        logger.addHandler(record)
    said.info("oa-train %s", " ".join(words))
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
    """Write the record of the command that is running to `run.log` in a folder; without a command nothing happens."""
    for handler in said.handlers:
        if isinstance(handler, Record):
            handler.write_to(folder)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del file, line
    sys.stderr.write(f"oa-train: warning: {message}\n")
    said.warning("%s (%s, %s:%d)", message, category.__name__, filename, lineno)


def _thread_ended(given: threading.ExceptHookArgs) -> None:
    """Record an error that has ended a thread, and warn of it.

    TensorBoard writes in a thread: that a file cannot be written is raised again where the writer is used next.
    """
    problem = given.exc_value
    if problem is None or isinstance(problem, SystemExit):
        return
    name = "A thread" if given.thread is None else given.thread.name
    message = f"{name} has ended: {type(problem).__name__}: {problem}"
    if not isinstance(problem, OSError) and sys.stderr is not None:
        sys.stderr.write(f"oa-train: warning: {message}\n")
    said.warning("%s", message, exc_info=problem)
