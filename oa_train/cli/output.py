"""What commands show on the terminal."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from oa_train.cli.record import said
from oa_train.metrics.estimates import Estimate
from oa_train.studies.front import Front

# Columns of what is read in a file and not on a terminal.
WIDTH = 160
# Names that are listed on one line.
MOST_NAMES = 60


class RecordedConsole(Console):
    """A console whose words also go into the record of the command, as plain text."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, and record."""
        shown = options if self.is_terminal else {"width": WIDTH} | options
        super().print(*objects, **shown)
        paper = Console(file=io.StringIO(), width=WIDTH, color_system=None)
        with paper.capture() as captured:
            paper.print(*objects, **options)
        for line in captured.get().rstrip().splitlines():
            said.info("%s", line)


class RateColumn(ProgressColumn):
    """Steps per second, or seconds per step when they are slow."""

    def render(self, task: Task) -> Text:
        """Text of the column."""
        speed = task.finished_speed or task.speed
        if not speed and task.elapsed:  # rich needs two steps to see a speed
            speed = task.completed / task.elapsed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} it/s" if speed >= 1 else f"{1 / speed:.1f} s/it")


console = RecordedConsole()
progress_console = Console(stderr=True)


def track(steps: Sequence[Any], description: str) -> Iterable[Any]:
    """Show a progress bar on the error stream while the steps are taken: done, of how many, rate, time remaining."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    said.info("%s: %d steps", description, len(steps))
    with Progress(*columns, console=progress_console) as progress:
        yield from progress.track(steps, description=description)


def estimate_cell(value: Estimate) -> str:
    """A mean with half the width of its 95 % interval."""
    return f"{value.mean:.3g} ± {value.ci95[1] - value.mean:.1g}"


def listed_names(names: Sequence[str]) -> str:
    """Names as far as they can be read, and how many more there are."""
    shown = ", ".join(names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES:,} more"


def metrics_table(title: str, metrics: Mapping[str, Estimate]) -> Table:
    """Figures of one thing, a row each."""
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("figure")
    table.add_column("mean ± 95 % interval", justify="right")
    for name, value in metrics.items():
        table.add_row(name, estimate_cell(value))
    return table


def front_table(front: Front, n_prompts: int) -> Table:
    """Circuits that were trained side by side, a row each, and their KL divergence under each ablation."""
    first = front.circuits[0]
    table = Table(
        title=f"KL divergence in nats, mean ± 95 % interval, on {n_prompts} held-out prompts", title_justify="left"
    )
    table.add_column(f"{first.level.parts}, of {len(first.level)}", justify="right")
    for kind in front.metrics:
        table.add_column(kind.replace("_", " "), justify="right")
    for number, circuit in enumerate(front.circuits):
        table.add_row(str(len(circuit)), *(estimate_cell(figures[number]["kl"]) for figures in front.metrics.values()))
    return table
