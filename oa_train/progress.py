"""How long loops tell that they are getting on, without knowing who listens."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Wraps a sequence of known length and a description; the command line passes a progress bar.
Track = Callable[[Sequence[Any], str], Iterable[Any]]


def silent(steps: Sequence[Any], description: str) -> Iterable[Any]:
    """Tell nobody."""
    del description
    return steps
