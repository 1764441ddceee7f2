"""Figures of lenses: divergence and agreement by layer, predictions for one prompt, causal faithfulness."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from oa_train.figures.comparison import draw_band, error_bars
from oa_train.figures.layers import layer_panels, over_layers
from oa_train.figures.style import FONT_SIZE, legend_beside, new_figure, write_in_cells
from oa_train.metrics.estimates import Estimate

# Colours of lenses in order of appearance; safe for red-green colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#555555", "#8C6D31")
MARKERS = "osD^vpPx"

# Maximum number of characters of a token in a cell.
MOST_CHARACTERS = 9


def lens_figure(lines: Mapping[str, Mapping[str, Sequence[Estimate]]], layers: Sequence[int], title: str) -> Figure:
    """KL divergence and agreement of each lens by layer, with 95 % bands.

    `lines` has the intervals of `kl` and `agreement` at each layer, by lens.
    """
    figure = new_figure(8.8, 3.6, title)
    left, right = figure.subplots(1, 2)
    for number, (name, measures) in enumerate(lines.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for axes, measure in ((left, "kl"), (right, "agreement")):
            draw_band(axes, layers, measures[measure], colour, marker=marker, markersize=3, linewidth=1.2, label=name)
    left.set_yscale("log")
    left.set_ylabel("KL divergence from the model (nats)", fontsize=FONT_SIZE)
    right.set_ylabel("same top token as the model", fontsize=FONT_SIZE)
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    right.set_ylim(-0.02, 1.02)
    for axes in (left, right):
        axes.set_xlabel("layer that is read", fontsize=FONT_SIZE)
        over_layers(axes)
    legend_beside(figure)
    return figure


def prediction_grid(
    words: Sequence[Sequence[str]],
    probabilities: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> Figure:
    """Grid of the top token at every layer and position, coloured by its probability; the first layer at the bottom.

    `words` are the top tokens, [layer][position], with their probabilities; `rows` are names of the layers, and
    `columns` the prompt's tokens.
    """
    figure = new_figure(min(24.0, 1.8 + 0.72 * len(columns)), 1.6 + 0.25 * len(rows), title)
    axes = figure.subplots()
    image = axes.imshow(probabilities, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    short = [[w if len(w) <= MOST_CHARACTERS else f"{w[: MOST_CHARACTERS - 1]}…" for w in row] for row in words]
    write_in_cells(axes, short, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize=FONT_SIZE - 2)
    axes.set_xticks(range(len(columns)), columns, fontsize=FONT_SIZE - 1, rotation=45, ha="right", parse_math=False)
    axes.set_ylabel("layer", fontsize=FONT_SIZE)
    figure.colorbar(image, ax=axes).set_label("probability of the top token", fontsize=FONT_SIZE - 1)
    return figure


def faithfulness_figure(
    panels: Mapping[tuple[str, str], Mapping[str, Sequence[Estimate]]], layers: Sequence[int], title: str
) -> Figure:
    """Agreement between effects on a model and on lenses by layer, with 95 % error bars.

    Each measure has a row of panels, each change a column.

    `panels` has the intervals of each lens at each layer, by measure and change.
    """
    measures = {"magnitude": "correlation of sizes", "similarity": "cosine of effects"}
    figure, grid = layer_panels(panels, measures, "layer", title)
    for place, lines in panels.items():
        for number, (name, points) in enumerate(lines.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.1}
            grid[place].errorbar(layers, *error_bars(points), label=name, **style)
    legend_beside(figure)
    return figure
