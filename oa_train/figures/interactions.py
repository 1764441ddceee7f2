"""Interactions of units: a heat map of pairs, and ranked bars."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from oa_train.figures.comparison import MOST_ROWS, error_bars
from oa_train.figures.style import FONT_SIZE, new_figure, tidy, write
from oa_train.metrics.estimates import Estimate

# Maximum numbers of units for which the numbers in the cells, and the names of the units, are legible.
MOST_WRITTEN, MOST_NAMED = 20, 60

BEYOND, WITHIN = "#0072B2", "#B0B0B0"


def interaction_map(
    table: np.ndarray, singles: np.ndarray, significant: np.ndarray, names: Sequence[str], label: str, title: str
) -> Figure:
    """Heat map of the interaction of every pair, red where it is positive; single effects are on the diagonal.

    `table` has symmetric [unit, unit] interactions in nats, NaN where a pair was not measured. Significant pairs are
    framed. `label` is the label of the colour bar.
    """
    n_units = len(names)
    size = min(max(3.2, (0.46 if n_units <= MOST_WRITTEN else 0.16) * n_units), 14.0)
    figure = new_figure(size + 2.0, size + 1.0, title)
    axes = figure.subplots()
    largest = float(np.nanmax(np.abs(table), initial=0)) or 1.0
    norm = TwoSlopeNorm(0, -largest, largest)
    image = axes.imshow(table, norm=norm, cmap="RdBu_r", interpolation="nearest")
    axes.set_facecolor("#F2F2F2")
    step = 1 + (n_units - 1) // MOST_NAMED
    axes.set_xticks(range(0, n_units, step), names[::step], rotation=90, fontsize=FONT_SIZE - 1)
    axes.set_yticks(range(0, n_units, step), names[::step], fontsize=FONT_SIZE - 1)
    for (row, column), value in np.ndenumerate(table):
        if row == column:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#E4E4E4", edgecolor="white"))
        if n_units <= MOST_WRITTEN and row == column:
            write(axes, column, row, _short(float(singles[row])), style="italic", color="#333333")
        elif n_units <= MOST_WRITTEN and not np.isnan(value):
            write(axes, column, row, _short(value), color="white" if abs(value) > 0.6 * largest else "black")
        if significant[row, column]:
            axes.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, linewidth=1.1))
    figure.colorbar(image, ax=axes, shrink=0.8).set_label(label, fontsize=FONT_SIZE - 1)
    return figure


def interaction_bars(
    names: Sequence[str], values: Sequence[Estimate], significant: Sequence[bool], label: str, title: str
) -> Figure:
    """Bars with 95 % intervals, the first on top, only as many as are legible; significant ones in colour.

    `label` is the label of the axis.
    """
    n_rows = min(len(names), MOST_ROWS)
    more = f"\nthe first {n_rows} of {len(names)}" if len(names) > n_rows else ""
    figure = new_figure(6.4, 1.3 + 0.19 * max(n_rows, 5), title + more)
    axes = figure.subplots()
    means, lengths = error_bars(values[:n_rows])
    colours = [BEYOND if beyond else WITHIN for beyond in significant[:n_rows]]
    axes.barh(range(n_rows), means, color=colours, height=0.7)
    axes.errorbar(means, range(n_rows), xerr=lengths, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=1.5)
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.set_yticks(range(n_rows), names[:n_rows])
    axes.set_ylim(n_rows - 0.5, -0.5)
    axes.set_xlabel(label, fontsize=FONT_SIZE - 1)
    axes.set_axisbelow(True)
    tidy(axes, "x")
    return figure


def _short(value: float) -> str:
    """A number short enough for a cell: "1.2", ".034", "-.002", "0"."""
    if abs(value) < 5e-4:
        return "0"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.3f}".replace("0.", ".", 1)
