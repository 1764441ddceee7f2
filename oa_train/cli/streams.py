"""Output streams whose errors never end a computation: text that cannot be written is dropped."""

import codecs
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

# Substitutes for characters that the terminal's encoding lacks.
_PLAIN = {"±": "+-", "…": "...", "━": "-", "•": "*"}


def _plain(problem: UnicodeError) -> tuple[str, int]:
    if not isinstance(problem, UnicodeEncodeError):
        raise problem
    characters = problem.object[problem.start : problem.end]
    return "".join(_PLAIN.get(character, "?") for character in characters), problem.end


codecs.register_error("oa_train.plain", _plain)


class SafeStream:
    """Passes text on to a stream; drops it if the stream is closed, its disk is full, or nobody reads it.

    Attributes:
        unread: the reader has closed its end of the pipe.
        full: the disk was full when something was written.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.unread = self.full = False
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="oa_train.plain")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or drop it if that fails."""
        self._dropping(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        self._dropping(self._stream.flush)

    def _dropping(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            self.unread = True
            with suppress(OSError, ValueError):  # so that Python's own flush at the end succeeds
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except (OSError, ValueError) as problem:
            self.full = self.full or getattr(problem, "errno", None) == errno.ENOSPC


@contextmanager
def safe_streams(quiet: bool) -> Iterator[tuple[SafeStream, SafeStream]]:
    """Replace standard output and error by safe streams, or by none if quiet; yields safe streams in either case."""
    with Path(os.devnull).open("w") as nowhere:
        output, error = SafeStream(sys.stdout or nowhere), SafeStream(sys.stderr or nowhere)
        shown: tuple[Any, Any] = (SafeStream(nowhere), SafeStream(nowhere)) if quiet else (output, error)
        with redirect_stdout(shown[0]), redirect_stderr(shown[1]):
            yield output, error
        output.flush()
        error.flush()
