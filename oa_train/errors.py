"""Every error that `oa_train` raises on purpose.

A message says what was given, what was expected and what to do about it. `exit_status` is what the command
line returns: 2 for a mistake that the user can mend before anything runs, 1 for a fault while running. Each
class is also the built-in error that it is, so that callers who do not know this module can still catch it.
"""

import difflib
from collections.abc import Iterable


class OaTrainError(Exception):
    """Base of all errors of this package.

    Attributes:
        exit_status: status of the process when the error ends a command.
    """

    exit_status = 2

    def __str__(self) -> str:
        # KeyError would show the repr of its argument, which turns line breaks into "\n".
        return str(self.args[0]) if self.args else ""


class ConfigurationError(OaTrainError, ValueError):
    """An option or argument has a value that cannot work."""


class UnknownNameError(OaTrainError, KeyError):
    """A name is not one of the known ones."""


class ModelError(OaTrainError, ValueError):
    """A model cannot be loaded, or is of a family that is not in the table."""


class TaskError(OaTrainError, ValueError):
    """A task cannot be posed to this tokenizer or with these options."""


class ArtefactError(OaTrainError, ValueError):
    """A file or folder is missing, damaged, of another kind, or belongs to another model."""


class CheckpointError(ArtefactError):
    """A training checkpoint is missing, damaged, or belongs to another model, component set or task."""


class NotFiniteError(OaTrainError, ArithmeticError):
    """A loss, gradient or trained tensor is NaN or infinite."""

    exit_status = 1


class RunError(OaTrainError, RuntimeError):
    """Something failed while a job was running."""

    exit_status = 1


def nearest_names(given: str, valid: Iterable[str], most: int = 3) -> str:
    """Say which valid names come near `given`.

    Args:
        given: the name that is not valid.
        valid: all valid names.
        most: how many near names to list.

    Returns:
        A sentence: "Did you mean a, b?" when something is near, else "Valid names: ..." (the first twenty).
    """
    names = list(dict.fromkeys(valid))
    near = difflib.get_close_matches(given, names, n=most, cutoff=0.6)
    if near:
        return f"Did you mean {', '.join(near)}?"
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"Valid names: {shown}."


def unknown_name(what: str, given: str, valid: Iterable[str]) -> UnknownNameError:
    """Make the error for a name that is not known.

    Args:
        what: what the name names ("component", "task").
        given: the name that was given.
        valid: all valid names.
    """
    return UnknownNameError(f"There is no {what} named {given!r}. {nearest_names(given, valid)}")
