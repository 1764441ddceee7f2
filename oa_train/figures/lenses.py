"""Figures of lenses: divergence and agreement by layer, predictions for one prompt, causal faithfulness."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from oa_train.figures.comparison import Interval
from oa_train.figures.style import FONT_SIZE, new_figure, set_title, write

# Colours of lenses in order of appearance; safe for red-green colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#555555", "#8C6D31")
MARKERS = "osD^vpPx"

# Maximum number of characters of a token in a cell.
MOST_CHARACTERS = 9


def lens_figure(lines: Mapping[str, Mapping[str, Sequence[Interval]]], layers: Sequence[int], title: str) -> Figure:
    """KL divergence and agreement of each lens by layer, with 95 % bands.

    Args:
        lines: intervals of `kl` and `agreement` at each layer, by lens.
        layers: indices of the layers.
        title: title of the figure.
    """
    figure = new_figure(8.8, 3.6)
    left, right = figure.subplots(1, 2)
    for number, (name, measures) in enumerate(lines.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for axes, measure in ((left, "kl"), (right, "agreement")):
            points = measures[measure]
            axes.plot(
                layers, [p.mean for p in points], color=colour, marker=marker, markersize=3, linewidth=1.2, label=name
            )
            axes.fill_between(
                layers, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, linewidth=0
            )
    left.set_yscale("log")
    left.set_ylabel("KL divergence from the model (nats)", fontsize=FONT_SIZE)
    right.set_ylabel("same top token as the model", fontsize=FONT_SIZE)
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    right.set_ylim(-0.02, 1.02)
    for axes in (left, right):
        axes.set_xlabel("layer that is read", fontsize=FONT_SIZE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=FONT_SIZE - 1)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=FONT_SIZE - 1)
    set_title(figure, title)
    return figure


def prediction_grid(
    words: Sequence[Sequence[str]],
    probabilities: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> Figure:
    """Grid of the top token at every layer and position, coloured by its probability; the first layer at the bottom.

    Args:
        words: top tokens, [layer][position].
        probabilities: probabilities of the top tokens, [layer, position].
        rows: names of the layers.
        columns: the prompt's tokens.
        title: title of the figure.
    """
    figure = new_figure(min(24.0, 1.8 + 0.72 * len(columns)), 1.6 + 0.25 * len(rows))
    axes = figure.subplots()
    image = axes.imshow(probabilities, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(probabilities):
        text = words[row][column]
        text = text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
        write(axes, column, row, text, color="white" if value > 0.6 else "black", parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize=FONT_SIZE - 2)
    axes.set_xticks(range(len(columns)), columns, fontsize=FONT_SIZE - 1, rotation=45, ha="right", parse_math=False)
    axes.set_ylabel("layer", fontsize=FONT_SIZE)
    figure.colorbar(image, ax=axes).set_label("probability of the top token", fontsize=FONT_SIZE - 1)
    set_title(figure, title)
    return figure


def faithfulness_figure(
    panels: Mapping[tuple[str, str], Mapping[str, Sequence[Interval]]], layers: Sequence[int], title: str
) -> Figure:
    """Agreement between effects on a model and on lenses by layer, with 95 % error bars.

    Each measure has a row of panels, each change a column.

    Args:
        panels: intervals of each lens at each layer, by measure and change.
        layers: indices of the layers.
        title: title of the figure.
    """
    measures, changes = (list(dict.fromkeys(key[n] for key in panels)) for n in (0, 1))
    figure = new_figure(1.4 + 2.7 * len(changes), 0.8 + 2.1 * len(measures))
    grid = figure.subplots(len(measures), len(changes), squeeze=False, sharex=True, sharey="row")
    names = {"magnitude": "correlation of sizes", "similarity": "cosine of effects"}
    for (measure, change), lines in panels.items():
        row, column = measures.index(measure), changes.index(change)
        axes = grid[row, column]
        for number, (name, points) in enumerate(lines.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            means = [point.mean for point in points]
            below = [max(0.0, point.mean - point.low) for point in points]
            above = [max(0.0, point.high - point.mean) for point in points]
            axes.errorbar(
                layers, means, [below, above], color=colour, marker=marker, markersize=3.5, linewidth=1.1, label=name
            )
        axes.axhline(0, color="#555555", linewidth=0.7, zorder=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=FONT_SIZE - 1)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if row == 0:
            axes.set_title(change, fontsize=FONT_SIZE)
        if column == 0:
            axes.set_ylabel(names.get(measure, measure), fontsize=FONT_SIZE)
        if row == len(measures) - 1:
            axes.set_xlabel("layer", fontsize=FONT_SIZE - 1)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=FONT_SIZE - 1)
    set_title(figure, title)
    return figure
