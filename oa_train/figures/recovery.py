"""Recovery of the model's behaviour by sets of units, against the size of the sets."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from oa_train.figures.comparison import draw_band, error_bars
from oa_train.figures.style import FONT_SIZE, new_figure, tidy
from oa_train.metrics.estimates import Estimate

# Colour and marker of each phase of a search.
STYLES: Mapping[str, tuple[str, str]] = {"restoring": ("#0072B2", "o"), "removing": ("#D55E00", "v")}

# Lower limit of the axis; recovery can be far below 0 (everything ablated).
LOWEST = -0.5


def recovery_figure(
    paths: Mapping[str, tuple[Sequence[int], Sequence[Estimate]]],
    trained: tuple[Sequence[int], Sequence[Estimate]],
    target: float,
    chosen: int,
    labels: tuple[str, str],
    title: str,
) -> Figure:
    """Recovery along the path of a search, with 95 % intervals as bands.

    Args:
        paths: sizes and recoveries of the sets of each phase, a key of `STYLES`.
        trained: sizes and recoveries of the sets whose constants were trained; may be empty.
        target: target recovery, drawn as a line.
        chosen: size of the final set, drawn as a line.
        labels: labels of the axes, first that of sizes.
        title: title of the figure.
    """
    figure = new_figure(6.2, 3.8, title)
    axes = figure.subplots()
    for name, (sizes, intervals) in paths.items():
        colour, marker = STYLES[name]
        order = np.argsort(sizes, kind="stable").tolist()
        ascending = [sizes[number] for number in order], [intervals[number] for number in order]
        draw_band(axes, *ascending, colour, marker=marker, markersize=3, linewidth=1, label=name)
    if trained[0]:
        means, lengths = error_bars(trained[1])
        style: dict[str, Any] = {"fmt": "D", "markersize": 4, "elinewidth": 1, "capsize": 2, "color": "#1B1B1B"}
        axes.errorbar(trained[0], means, lengths, label="constants trained for the set", **style)
    axes.axhline(target, color="#555555", linewidth=0.8, linestyle=":", label=f"target: {target:g}")
    axes.axvline(chosen, color="#009E73", linewidth=1.0, linestyle="--", label=f"final set: {chosen}")
    lowest, highest = axes.get_ylim()
    axes.set_ylim(max(lowest, LOWEST), highest)
    axes.set_xlabel(labels[0], fontsize=FONT_SIZE)
    axes.set_ylabel(labels[1], fontsize=FONT_SIZE)
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=3, fontsize=FONT_SIZE - 1, frameon=False)
    return figure
