"""Progress bars on a terminal; elsewhere a line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from oa_train.cli.run_log import log
from oa_train.progress import BETWEEN_LINES, Advance, Track, duration


class Bars(Track):
    """Shows each stage on stderr: a bar with passes and remaining time, or lines where that is not a terminal."""

    @contextmanager
    def __call__(self, passes: int, description: str) -> Iterator[Advance]:
        """Show a stage with its bar."""
        log.info("%s: %s passes", description, f"{passes:,}")
        console = Console(stderr=True)
        with _bar(console, passes, description) if console.is_terminal else _lines(passes, description) as advance:
            yield advance

    def say(self, line: str) -> None:
        """Print a line on stderr, and log it."""
        log.info("%s", line)
        print(line, file=sys.stderr, flush=True)


track = Bars()


@contextmanager
def _bar(console: Console, passes: int, description: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} passes"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # Rates are averaged over the last half minute, which is enough for several runs of a large model.
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        task = progress.add_task(description, total=passes)
        yield lambda done: progress.advance(task, done)


@contextmanager
def _lines(passes: int, description: str) -> Iterator[Advance]:
    begun = last = time.monotonic()
    done = 0

    def advance(more: int) -> None:
        nonlocal done, last
        done, now = done + more, time.monotonic()
        if now - last >= BETWEEN_LINES and done < passes:
            last, left = now, (now - begun) * (passes - done) / done
            print(f"{description}: {done / passes:.0%}, {duration(left)} left", file=sys.stderr, flush=True)

    yield advance
    taken = duration(time.monotonic() - begun)
    print(f"{description}: {done:,} passes in {taken}", file=sys.stderr, flush=True)
