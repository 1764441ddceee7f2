"""Figures of causal tracing: recovery by layer, as lines and as heat maps."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oa_train.figures.comparison import Interval
from oa_train.figures.style import FONT_SIZE, ablation_style, new_figure, set_title

# Interval at each layer, by corruption.
Profiles = Mapping[str, Sequence[Interval]]

MOST_TICKS = 16


def profile_figure(
    panels: Mapping[tuple[str, str], Profiles], layers: Sequence[int], labels: Mapping[str, str], title: str
) -> Figure:
    """Recovered share by layer with 95 % bands: a row of panels for each restored kind, a column for each place.

    Args:
        panels: profile of each corruption over the layers, by kind and place.
        layers: indices of the layers.
        labels: labels of the corruptions in the legend.
        title: title of the figure.
    """
    kinds, places = (list(dict.fromkeys(key[n] for key in panels)) for n in (0, 1))
    figure = new_figure(1.2 + 3.1 * len(places), 0.9 + 2.0 * len(kinds))
    grid = figure.subplots(len(kinds), len(places), squeeze=False, sharex=True, sharey=True)
    for row, kind in enumerate(kinds):
        for column, place in enumerate(places):
            axes = grid[row, column]
            axes.axhline(0, color="#555555", linewidth=0.7, zorder=0)
            for name, points in panels.get((kind, place), {}).items():
                colour, marker = ablation_style(name)
                low, high = [point.low for point in points], [point.high for point in points]
                means = [point.mean for point in points]
                axes.plot(
                    layers, means, color=colour, marker=marker, markersize=2.5, linewidth=1.2, label=labels[name]
                )
                axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(labelsize=FONT_SIZE - 1)
            axes.grid(color="#E5E5E5", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(place, fontsize=FONT_SIZE)
            if column == 0:
                axes.set_ylabel(f"{kind}\nrecovered share", fontsize=FONT_SIZE - 1)
            if row == len(kinds) - 1:
                axes.set_xlabel("layer in the middle of the window", fontsize=FONT_SIZE - 1)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=FONT_SIZE - 1)
    set_title(figure, title)
    return figure


def recovery_maps(
    tables: Mapping[tuple[str, str], np.ndarray],
    rows: Sequence[str],
    layers: Sequence[int],
    title: str,
    highest: float | None = None,
) -> Figure:
    """Heat maps of recovery, a row for each place or token, a column for each layer; the first row on top.

    Args:
        tables: [row, layer] recoveries, by the names of the map's row and column in the grid of maps.
        rows: names of the rows.
        layers: indices of the layers.
        title: title of the figure.
        highest: upper end of the colour scale; by default the largest value.
    """
    down, across = (list(dict.fromkeys(key[n] for key in tables)) for n in (0, 1))
    longest, width = max(map(len, rows)), min(max(2.2, 0.13 * len(layers)), 5.0)
    height = max(0.8, 0.2 * len(rows))
    figure = new_figure(1.6 + 0.07 * longest + len(across) * (width + 0.2), 0.9 + len(down) * (height + 0.4))
    grid = figure.subplots(len(down), len(across), squeeze=False, sharex=True, sharey=True)
    top = max(1e-3, max(float(table.max()) for table in tables.values())) if highest is None else highest
    step = 1 + (len(layers) - 1) // MOST_TICKS
    for (line, column), table in tables.items():
        axes = grid[down.index(line), across.index(column)]
        image = axes.imshow(table, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set_title(f"{column}, {line}", fontsize=FONT_SIZE)
        axes.set_yticks(range(len(rows)), rows, fontsize=FONT_SIZE - 2, parse_math=False)
        axes.set_xticks(range(0, len(layers), step), layers[::step], fontsize=FONT_SIZE - 2)
    for axes in grid[-1]:
        axes.set_xlabel("layer", fontsize=FONT_SIZE - 1)
    figure.colorbar(image, ax=grid, shrink=0.9).set_label("recovered share", fontsize=FONT_SIZE - 1)
    set_title(figure, title)
    return figure
