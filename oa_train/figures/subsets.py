"""KL divergence of a circuit with many combinations of the parts outside it kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oa_train.figures.comparison import error_bars
from oa_train.figures.style import FONT_SIZE, new_figure, tidy
from oa_train.metrics.estimates import Estimate

# Colours of the masks of the outside parts that have a row of their own.
MARKED: Mapping[str, str] = {"all off": "#0072B2", "worst vertex": "#E69F00", "worst": "#D55E00"}
CLEAN = "#009E73"
# Below this divergence, in nats, the axis is linear down to zero.
SMALLEST_LINEAR = 1e-3


@dataclass(frozen=True)
class Subsets:
    """Divergences under one ablation, in nats.

    Attributes:
        title: title above the panel.
        random: divergences of the random subsets, by the share of the outside parts that is kept.
        marked: divergences of the masks in `MARKED`.
    """

    title: str
    random: Mapping[float, Sequence[float]]
    marked: Mapping[str, Estimate]


def subsets_figure(panels: Sequence[Subsets], title: str) -> Figure:
    """KL divergence with random subsets of the outside parts kept, a row per density, and with the marked masks.

    The panels, one for each ablation, are drawn from top to bottom.
    """
    n_rows = [len(panel.random) + len(panel.marked) + 1 for panel in panels]
    figure = new_figure(6.4, 1.0 + sum(0.4 + 0.24 * rows for rows in n_rows), title)
    all_axes = figure.subplots(len(panels), 1, height_ratios=n_rows, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel)
    positive = [value for panel in panels for value in _means(panel) if value > 0]
    linear = max(SMALLEST_LINEAR, min(positive, default=0.0))
    for axes in all_axes:
        axes.set_xscale("symlog", linthresh=linear, linscale=0.4)
        axes.set_xlim(left=-0.15 * linear)
    all_axes[-1].set_xlabel("KL divergence from the clean model (nats)", fontsize=FONT_SIZE)
    return figure


def _means(panel: Subsets) -> list[float]:
    marked = [interval.mean for interval in panel.marked.values()]
    return [*marked, *(value for values in panel.random.values() for value in values)]


def _draw(axes: Axes, panel: Subsets) -> None:
    jitter = np.random.default_rng(0)
    for row, values in enumerate(panel.random.values()):
        heights = row + jitter.uniform(-0.25, 0.25, len(values))
        axes.plot(values, heights, "o", color="#777777", markersize=3, alpha=0.6, markeredgewidth=0)
    names = [f"{density:.0%} kept at random" for density in panel.random]
    for row, (name, interval) in enumerate(panel.marked.items(), start=len(names)):
        means, lengths = error_bars([interval], 0.0)
        axes.errorbar(means, [row], xerr=lengths, fmt="D", color=MARKED[name], markersize=4, elinewidth=1.2)
        axes.axvline(interval.mean, color=MARKED[name], linewidth=0.8, linestyle=":", zorder=0)
    names += [*panel.marked, "all on (clean)"]
    axes.plot(0, len(names) - 1, "D", color=CLEAN, markersize=4)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(panel.title, fontsize=FONT_SIZE, loc="left")
    tidy(axes, "x")
