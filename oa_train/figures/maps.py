"""Heat maps of the keep-probabilities of a mask's entries."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from oa_train.figures.style import FONT_SIZE, new_figure, write

# With more cells than this, numbers in them are illegible.
MOST_LABELLED = 200
# Beyond this many rows or columns their names cannot be read.
MOST_NAMED = 60
# Inches of a cell, by whether it holds a number.
LABELLED_CELL, NAMED_CELL = 0.42, 0.16


def score_map(
    table: np.ndarray, rows: Sequence[str], columns: Sequence[str], axes_names: tuple[str, str], threshold: float
) -> Figure:
    """Keep-probabilities as a table, its first row at the bottom.

    It is blank where there is no entry, and framed where one exceeds the threshold.

    Args:
        table: [row, column] values between 0 and 1; NaN where there is no entry.
        rows: names of the rows.
        columns: names of the columns.
        axes_names: labels of the axes, that of the rows first.
        threshold: entries above it are in the circuit.
    """
    labelled = table.size <= MOST_LABELLED
    longest = max(table.shape)
    cell = LABELLED_CELL if labelled else NAMED_CELL if longest <= MOST_NAMED else 6.0 / longest
    width, height = cell * table.shape[1] + 2.2, cell * table.shape[0] + 1.2
    figure = new_figure(min(max(4.0, width), 20.0), min(max(2.6, height), 20.0))
    axes = figure.subplots()
    image = axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest", origin="lower")
    axes.set_facecolor("#F2F2F2")
    size = FONT_SIZE - (1 if labelled else 3)
    for names, set_ticks, turned in ((columns, axes.set_xticks, not labelled), (rows, axes.set_yticks, False)):
        if len(names) <= MOST_NAMED:
            set_ticks(range(len(names)), names, fontsize=size, rotation=90 if turned else 0)
    axes.tick_params(labelsize=size)
    axes.set_ylabel(axes_names[0], fontsize=FONT_SIZE)
    axes.set_xlabel(axes_names[1], fontsize=FONT_SIZE)
    if labelled:
        _label(axes, table, threshold)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("keep-probability", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1)
    n_kept, n_entries = int((np.nan_to_num(table) > threshold).sum()), int((~np.isnan(table)).sum())
    framed = " (framed)" if labelled else ""
    axes.set_title(f"{n_kept} of {n_entries} above the threshold {threshold:g}{framed}", fontsize=FONT_SIZE)
    return figure


def _label(axes: Axes, table: np.ndarray, threshold: float) -> None:
    """Write the number into each cell, and frame those above the threshold."""
    for (row, column), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        colour = "white" if value > 0.6 else "black"
        write(axes, column, row, f"{value:.2f}", color=colour)
        if value > threshold:
            place = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="black", linewidth=1.2))
