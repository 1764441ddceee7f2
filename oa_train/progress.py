"""Progress of long loops; silent unless something shows it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Wraps a sequence of known length and a description; the command line passes a progress bar.
Track = Callable[[Sequence[Any], str], Iterable[Any]]


def silent(steps: Sequence[Any], description: str) -> Iterable[Any]:
    """Show nothing."""
    return steps
