"""Writes docs/errors.md from the docstrings of oa_train/errors.py: `python docs/errors_page.py docs`.

`make docs` runs it, and a test compares the committed page with its output.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from oa_train import errors
from oa_train.errors import EXIT_STATUSES, OaTrainError

_HEAD = """\
<!-- Written by `make docs` from oa_train/errors.py; edit the docstrings there. -->

# Errors

Every error that `oa_train` raises on purpose is one of these classes of `oa_train.errors`. Its message says in the
first line what is wrong; what was expected, the nearest valid names and what to do follow. On the command line a
mistake ends with status 2 and without a traceback, before anything is written; `run.log` in the run folder holds the
traceback of an error that ended a run, and `OA_TRAIN_TRACEBACK=1` prints that of a fault.

## Exit statuses of `oa-train`

| status | meaning |
|---|---|
"""

_CLASSES = """
## Classes

A class is also the built-in error that it is, so `except ValueError` catches a `ConfigurationError`.
"""


def errors_page() -> str:
    """The page about errors and exit statuses, as Markdown."""
    rows = "".join(f"| {status} | {_cell(meaning)} |\n" for status, meaning in EXIT_STATUSES.items())
    return _HEAD + rows + _CLASSES + "".join(_section(kind) for kind in error_classes())


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def error_classes() -> Iterator[type[OaTrainError]]:
    """All error classes, in the order of their module."""
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, OaTrainError):
            yield kind


def main(argv: Sequence[str]) -> None:
    """Write the pages into the folder that is named."""
    (folder,) = argv
    (Path(folder) / "errors.md").write_text(errors_page(), encoding="utf-8")


def _section(kind: type[OaTrainError]) -> str:
    meaning, _, rest = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    advice = rest.partition("\n\nAttributes:")[0]
    builtin = next(one.__name__ for one in kind.__mro__ if one.__module__ == "builtins")
    kinds = ", ".join(f"`{name}`" for name in dict.fromkeys([kind.__bases__[0].__name__, builtin]))
    return f"\n### {kind.__name__}\n\n{meaning}\n\n{advice}\n\nExit status {kind.exit_status}. Is also: {kinds}.\n"


if __name__ == "__main__":
    main(sys.argv[1:])
