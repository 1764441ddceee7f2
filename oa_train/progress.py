"""Progress of long work; silent unless something shows it.

Work is counted in passes: runs of the model on one prompt, as one circuit. One with gradients counts twice.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

# Counts finished passes.
Advance = Callable[[int], None]

# A pass with a backward pass takes about as long as two without.
WITH_GRADIENTS = 2

# Seconds between two progress lines if output goes to a file.
BETWEEN_LINES = 60.0

# Seconds of work before its duration is estimated, and the shortest estimate that is shown.
MEASURED, WORTH_SAYING = 1.0, 10.0

# Share of a stage after which its remaining time is estimated from its own pace instead of that of all stages so far.
PACED = 0.05

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """A part of some work that is known in advance."""

    description: str
    passes: int


class Track:
    """Shows the stages of some work. This one shows nothing; subclasses override `__call__` and `say`.

    Attributes:
        stages: the stages that are known in advance.
    """

    stages: Sequence[Stage] = ()

    @contextmanager
    def __call__(self, passes: int, description: str) -> Iterator[Advance]:
        """Show a stage for the duration of the context, which yields the function that counts its passes."""
        yield lambda done: None

    def say(self, line: str) -> None:
        """Show a line."""

    def planned(self, stages: Sequence[Stage]) -> "Track":
        """This track for work with these stages: they are numbered, and their total duration is estimated."""
        return _Planned(self, stages)


silent = Track()


class _Planned(Track):
    """Numbers the stages of a plan, and shows its estimated duration as soon as it is known and when it changes."""

    def __init__(self, shown: Track, stages: Sequence[Stage]) -> None:
        self._shown, self.stages = shown, list(stages)
        self._number, self._done, self._start, self._said = 0, 0, 0.0, 0.0

    @contextmanager
    def __call__(self, passes: int, description: str) -> Iterator[Advance]:
        self._number += 1
        numbered = f"{self._number} of {max(self._number, len(self.stages))}  {description}"
        later = sum(stage.passes for stage in self.stages[self._number :])
        begun, done = time.monotonic(), 0
        self._start = self._start or begun
        with self._shown(passes, numbered if len(self.stages) > 1 else description) as advance:

            def count(more: int) -> None:
                nonlocal done
                done, self._done = done + more, self._done + more
                advance(more)
                now = time.monotonic()
                # The first passes of a stage are often much slower than the others.
                its_own = done >= PACED * passes or self._done == done
                of_all = (now - self._start) / self._done
                pace = (now - begun) / done if its_own else of_all
                if now - begun >= MEASURED:
                    self._estimated(now - self._start, pace * (passes - done) + of_all * later)

            yield count

    def _estimated(self, elapsed: float, left: float) -> None:
        total = elapsed + left
        if left > WORTH_SAYING and not self._said / 1.5 < total < 1.5 * self._said:
            self.say(f"this takes about {duration(total)}" + (f", {duration(left)} from now" if self._said else ""))
            self._said = total

    def say(self, line: str) -> None:
        self._shown.say(line)


def counted(track: Track, items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate over batches, one pass for each of their prompts."""
    sizes = [len(item) for item in items]  # type: ignore[arg-type]
    with track(sum(sizes), description) as advance:
        for item, size in zip(items, sizes, strict=True):
            yield item
            advance(size)


def duration(seconds: float) -> str:
    """A duration in words: "40 s", "4 min", "2 h 10 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
