"""Figures of causal tracing: recovery by layer, as lines and as heat maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from oa_train.figures.comparison import draw_band
from oa_train.figures.layers import layer_panels
from oa_train.figures.style import FONT_SIZE, ablation_style, legend_beside, new_figure
from oa_train.metrics.estimates import Estimate

# Estimate at each layer, by corruption.
Profiles = Mapping[str, Sequence[Estimate]]

MOST_TICKS = 16


def profile_figure(
    panels: Mapping[tuple[str, str], Profiles], layers: Sequence[int], labels: Mapping[str, str], title: str
) -> Figure:
    """Recovered share by layer with 95 % bands: a row of panels for each restored kind, a column for each place.

    `panels` has the profile of each corruption over the layers, by kind and place; `labels` are for the legend.
    """
    kinds = {kind: f"{kind}\nrecovered share" for kind, _ in panels}
    figure, grid = layer_panels(panels, kinds, "layer in the middle of the window", title)
    for place, profiles in panels.items():
        for name, points in profiles.items():
            colour, marker = ablation_style(name)
            line: dict[str, Any] = {"marker": marker, "markersize": 2.5, "linewidth": 1.2}
            draw_band(grid[place], layers, points, colour, label=labels[name], **line)
    legend_beside(figure)
    return figure


def recovery_maps(
    tables: Mapping[tuple[str, str], np.ndarray],
    rows: Sequence[str],
    layers: Sequence[int],
    title: str,
    highest: float | None = None,
) -> Figure:
    """Heat maps of recovery, a row for each place or token, a column for each layer; the first row on top.

    `tables` has [row, layer] recoveries, by the names of the map's row and column in the grid of maps. `highest` is
    the upper end of the colour scale, by default the largest value.
    """
    down, across = (list(dict.fromkeys(key[n] for key in tables)) for n in (0, 1))
    longest, width = max(map(len, rows)), min(max(2.2, 0.13 * len(layers)), 5.0)
    height = max(0.8, 0.2 * len(rows))
    figure = new_figure(1.6 + 0.07 * longest + len(across) * (width + 0.2), 0.9 + len(down) * (height + 0.4), title)
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
    return figure
