"""Terminal output of the commands."""

import io
import re
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from oa_train.cli.record import log
from oa_train.studies.study import Findings, Table

# Columns of output that is read in a file and not on a terminal.
WIDTH = 160

_NUMBER = re.compile(r"[-+]?[\d.]|$")


class RecordedConsole(Console):
    """A console whose output also goes into the log of the command, as plain text. Names are never markup."""

    def __init__(self) -> None:
        super().__init__(markup=False, highlight=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, and log."""
        shown = options if self.is_terminal else {"width": WIDTH} | options
        super().print(*objects, **shown)
        paper = Console(file=io.StringIO(), width=WIDTH, color_system=None, markup=False, highlight=False, emoji=False)
        with paper.capture() as captured:
            paper.print(*objects, **options)
        for line in captured.get().rstrip().splitlines():
            log.info("%s", line)


console = RecordedConsole()


def show(findings: Findings) -> None:
    """Print the tables and lines of a study, and where its results are."""
    for part in findings.shown:
        console.print(part if isinstance(part, str) else _table(part), soft_wrap=isinstance(part, str))
    if findings.folder is not None:
        console.print(f"results: {findings.folder}", soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table."""
    console.print(_table(table))


def _table(table: Table) -> RichTable:
    """A table whose columns of numbers are aligned to the right."""
    width = min(max(map(len, table.title.split("\n"))), WIDTH)
    shown = RichTable(title=table.title, title_justify="left", padding=(0, 0, 0, 1), min_width=width)
    columns = dict.fromkeys(name for row in table.rows for name in row)
    cells = [[_cell(row.get(name)) for name in columns] for row in table.rows]
    for name, column in zip(columns, zip(*cells, strict=True), strict=True):
        numbers = all(map(_NUMBER.match, column)) and any(column)
        is_first = not shown.columns
        shown.add_column(name, justify="right" if numbers else "left", no_wrap=numbers or is_first)
    for row in cells:
        shown.add_row(*row)
    return shown


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
