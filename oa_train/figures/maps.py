"""Heat maps: keep-probabilities of a mask's entries, and counts at each head and MLP."""

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from oa_train.figures.style import FONT_SIZE, new_figure, write_in_cells

# Maximum number of cells for which numbers in them are legible.
MOST_LABELLED = 400
# Maximum number of rows or columns for which their names are legible.
MOST_NAMED = 60
# Size in inches of a cell with a number, and of a cell without.
LABELLED_CELL, NAMED_CELL = 0.42, 0.16


def score_map(
    table: np.ndarray, rows: Sequence[str], columns: Sequence[str], axes_names: tuple[str, str], threshold: float
) -> Figure:
    """Heat map of keep-probabilities, the first row at the bottom.

    `table` has [row, column] values between 0 and 1, and NaN where there is no entry. Cells without an entry are
    blank, and cells above the threshold are framed. `axes_names` are the labels of the axes, first that of the rows.
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
        else:
            set_ticks(*_first_of_layers(names), fontsize=size)
    axes.tick_params(labelsize=size)
    by_layer = [", by layer" if len(names) > MOST_NAMED else "" for names in (rows, columns)]
    axes.set_ylabel(axes_names[0] + by_layer[0], fontsize=FONT_SIZE)
    axes.set_xlabel(axes_names[1] + by_layer[1], fontsize=FONT_SIZE)
    if labelled:
        write_in_cells(axes, [["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in table])
        for row, column in np.argwhere(table > threshold):
            place = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="black", linewidth=1.2))
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("keep-probability", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1)
    n_kept, n_entries = int((np.nan_to_num(table) > threshold).sum()), int((~np.isnan(table)).sum())
    framed = " (framed)" if labelled else ""
    axes.set_title(f"{n_kept:,} of {n_entries:,} above the threshold {threshold:g}{framed}", fontsize=FONT_SIZE)
    return figure


def count_map(table: np.ndarray, columns: Sequence[str], label: str, title: str) -> Figure:
    """Heat map of [layer, column] counts, a column for each head and one for MLPs; layer 0 is at the bottom.

    `label`, for the colour bar, says what is counted.
    """
    n_layers, n_columns = table.shape
    height, width = (0.3 if n_layers > 12 else 0.42) * n_layers + 1.4, LABELLED_CELL * n_columns + 2.4
    figure = new_figure(min(max(4.0, width), 20.0), min(max(2.6, height), 20.0), title)
    axes = figure.subplots()
    norm = Normalize(0, max(1.0, float(table.max())))
    image = axes.imshow(table, norm=norm, cmap="Blues", aspect="auto", interpolation="nearest", origin="lower")
    axes.set_xticks(range(n_columns), columns, fontsize=FONT_SIZE - 1, rotation=90 if n_columns > 16 else 0)
    axes.set_yticks(range(n_layers), [str(layer) for layer in range(n_layers)], fontsize=FONT_SIZE - 1)
    axes.set_ylabel("layer", fontsize=FONT_SIZE)
    if table.size <= MOST_LABELLED:
        write_in_cells(axes, [[f"{value:g}" for value in row] for row in table])
    figure.colorbar(image, ax=axes).set_label(label, fontsize=FONT_SIZE)
    return figure


def _first_of_layers(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Ticks for names of units ("a3.h0.q"): index of a layer's first unit and the layer's number; at most 40 ticks."""
    layers = [re.match(r"[a-z](\d+)", name) for name in names]
    firsts: dict[str, int] = {}
    for place, layer in enumerate(layers):
        if layer is not None:
            firsts.setdefault(layer[1], place)
    step = 1 + (len(firsts) - 1) // 40
    return list(firsts.values())[::step], list(firsts)[::step]
