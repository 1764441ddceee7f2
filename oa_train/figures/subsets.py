"""Divergence of a circuit when parts outside of it are kept in many combinations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oa_train.figures.comparison import Interval
from oa_train.figures.style import FONT_SIZE, new_figure, set_title

# Colour of each mask of the parts outside that is marked by a line.
MARKED: Mapping[str, str] = {"all off": "#0072B2", "worst vertex": "#E69F00", "worst": "#D55E00"}
CLEAN = "#009E73"
# Smaller divergences, in nats, are drawn linearly down to zero.
SMALLEST_LINEAR = 1e-3


@dataclass(frozen=True)
class Subsets:
    """Divergences under one ablation, in nats.

    Attributes:
        title: above the panel.
        random: of the random subsets, by the share of the parts outside that is kept.
        marked: of the masks in `MARKED`.
    """

    title: str
    random: Mapping[float, Sequence[float]]
    marked: Mapping[str, Interval]


def subsets_figure(panels: Sequence[Subsets], title: str) -> Figure:
    """KL divergence with random subsets of the outside kept, a row for each density, beside the marked masks.

    Args:
        panels: one for each ablation, from top to bottom.
        title: of the figure.
    """
    n_rows = [max(1, len(panel.random)) for panel in panels]
    figure = new_figure(7.4, 1.3 + sum(0.5 + 0.3 * rows for rows in n_rows))
    all_axes = figure.subplots(len(panels), 1, height_ratios=n_rows, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel)
    all_axes[-1].set_xlabel("KL divergence from the clean model (nats)", fontsize=FONT_SIZE)
    handles, names = all_axes[0].get_legend_handles_labels()
    place: dict[str, Any] = {"loc": "outside right upper", "frameon": False, "fontsize": FONT_SIZE - 1}
    figure.legend(handles, names, title="outside parts", title_fontsize=FONT_SIZE - 1, **place)
    set_title(figure, title)
    return figure


def _draw(axes: Axes, panel: Subsets) -> None:
    jitter = np.random.default_rng(0)
    for row, values in enumerate(panel.random.values()):
        heights = row + jitter.uniform(-0.25, 0.25, len(values))
        label = "random subset" if row == 0 else None
        axes.plot(values, heights, "o", color="#777777", markersize=3, alpha=0.6, markeredgewidth=0, label=label)
    for name, interval in panel.marked.items():
        axes.axvspan(interval.low, interval.high, color=MARKED[name], alpha=0.12, linewidth=0)
        axes.axvline(interval.mean, color=MARKED[name], linewidth=1.3, label=name)
    axes.axvline(0, color=CLEAN, linewidth=1.3, label="all on (clean)")
    shown = [value for values in panel.random.values() for value in values]
    shown += [interval.mean for interval in panel.marked.values()]
    positive = [value for value in shown if value > 0]
    if positive:
        axes.set_xscale("symlog", linthresh=max(SMALLEST_LINEAR, min(positive)), linscale=0.4)
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1] if not positive else -0.1 * max(SMALLEST_LINEAR, min(positive)))
    axes.set_yticks(range(len(panel.random)), [f"{density:.0%} kept" for density in panel.random])
    axes.set_ylim(max(0.5, len(panel.random) - 0.5), -0.5)
    axes.set_title(panel.title, fontsize=FONT_SIZE, loc="left")
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
