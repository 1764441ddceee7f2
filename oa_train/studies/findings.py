"""Findings of a study: its rows, metrics and figures, and their conversion to JSON, CSV and data frames."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.errors import ConfigurationError
from oa_train.figures.style import Figure
from oa_train.files import replace_file
from oa_train.metrics.estimates import Estimate

if TYPE_CHECKING:
    import pandas as pd

# Plain values or estimates by column name.
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table for the terminal: a title and rows of strings, numbers and estimates."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True, eq=False)
class Findings:
    """Results of a study.

    Attributes:
        rows: the study's table, written to `results.json` and `tables/<table>.csv`.
        metrics: estimates of the main results by name.
        facts: further keys of `results.json`; plain values and estimates.
        shown: tables and lines for the terminal.
        figures: functions by name that draw a figure, or return None if there is nothing to draw; called after the
            results have been written.
        circuit: sizes of the circuit.
        trained: a circuit that the study produced, written to `circuit/` and `constants/` in its folder; it can be
            used like the circuit of a run.
        table: name of the CSV file.
        folder: the study's folder, once written.
    """

    rows: Sequence[Row]
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    shown: Sequence[Table | str] = ()
    figures: Mapping[str, Callable[[], Figure | None]] = field(default_factory=dict)
    circuit: Mapping[str, int] | None = None
    trained: TrainedCircuit | None = None
    table: str = "rows"
    folder: Path | None = None

    def where(self, **values: Any) -> list[Row]:
        """Rows with these values: `findings.where(component="circuit", ablation="mean")`."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in values.items())]

    def flat_rows(self) -> list[dict[str, Any]]:
        """Rows of plain values; an estimate becomes the columns `x`, `x_stderr`, `x_low` and `x_high`."""
        return [_flat(row) for row in self.rows]

    def to_frame(self) -> "pd.DataFrame":
        """The rows as a pandas data frame, with the columns of `flat_rows`.

        Raises:
            ConfigurationError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as problem:
            raise ConfigurationError("to_frame needs pandas: pip install 'oa_train[pandas]'.") from problem
        return pd.DataFrame(self.flat_rows())


def listed(names: Sequence[str], most: int, between: str = ", ") -> str:
    """Names in a line; of more than `most` the first ones, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def plain(value: Any) -> Any:
    """Convert estimates, dataclasses and containers of them to values that JSON can hold."""
    if isinstance(value, Estimate):
        return value.as_json()
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Estimate):
            low, high = value.ci95
            flat |= {name: value.mean, f"{name}_stderr": value.stderr, f"{name}_low": low, f"{name}_high": high}
        else:
            flat[name] = value
    return flat


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of plain values to a CSV file, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(exist_ok=True)
    replace_file(path, text.getvalue().encode())
