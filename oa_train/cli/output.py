"""Terminal output of the commands."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable

from oa_train.cli.run_log import log

if TYPE_CHECKING:
    from oa_train.studies.findings import Findings

# Width in characters of output that does not go to a terminal.
WIDTH = 160

_NUMBER = re.compile(r"[-+]?[\d.]|$")


class RecordedConsole(Console):
    """A console whose output also goes to the log of the command, as plain text. Text is never read as markup."""

    def __init__(self) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, record=True)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, and log the text."""
        self._width = None if self.is_terminal else WIDTH
        super().print(*objects, **options)
        for line in self.export_text().rstrip().splitlines():
            log.info("%s", line)


console = RecordedConsole()


def show(findings: "Findings") -> None:
    """Print the tables and lines of a study, and where its results are."""
    for part in findings.shown:
        if isinstance(part, str):
            console.print(part, soft_wrap=True)
        else:
            print_table(part.title, part.rows)
    if findings.folder is not None:
        console.print(f"results: {findings.folder}", soft_wrap=True)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    console.print(table_of(title, rows))


def table_of(title: str, rows: Sequence[Mapping[str, Any]]) -> RichTable:
    """A table whose columns of numbers are right-aligned."""
    width = min(max(map(len, title.split("\n"))), WIDTH)
    shown = RichTable(title=title, title_justify="left", padding=(0, 0, 0, 1), min_width=width)
    columns = dict.fromkeys(name for row in rows for name in row)
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    for name, column in zip(columns, zip(*cells, strict=True), strict=True):
        numbers = all(map(_NUMBER.match, column)) and any(column)
        shown.add_column(
            name,
            justify="right" if numbers else "left",
            no_wrap=numbers or not shown.columns,
            min_width=min(12, max(map(len, column))),
        )
    for row in cells:
        shown.add_row(*row)
    return shown


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str("" if value is None else value)
    )
