"""What commands show on the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track as rich_track
from rich.table import Table

from oa_train.studies.statistics import Estimate

console = Console()
progress_console = Console(stderr=True)


def track(steps: Sequence[Any], description: str) -> Iterable[Any]:
    """Show a progress bar on the error stream while the steps are taken."""
    return rich_track(steps, description=description, console=progress_console)


def estimate_cell(value: Estimate) -> str:
    """A mean with half the width of its 95 % interval."""
    return f"{value.mean:.3g} ± {value.ci95[1] - value.mean:.1g}"


def metrics_table(title: str, metrics: Mapping[str, Estimate]) -> Table:
    """Figures of one thing, a row each."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("mean ± 95 % interval", justify="right")
    for name, value in metrics.items():
        table.add_row(name, estimate_cell(value))
    return table
