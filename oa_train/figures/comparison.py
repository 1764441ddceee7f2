"""Ablations side by side: the circuit above, every component alone below."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oa_train.figures.style import ABLATION_COLOURS, FONT_SIZE, new_figure

# Divergences are drawn on a logarithmic axis; what lies below is drawn at its edge.
SMALLEST_KL = 1e-5


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def comparison_figure(
    circuit: Mapping[str, Interval], components: Mapping[str, Sequence[Interval]], names: Sequence[str], title: str
) -> Figure:
    """KL divergence under each ablation, with 95 % intervals.

    Args:
        circuit: divergence of the circuit, for each ablation.
        components: divergence with one component ablated, for each ablation, in the order of `names`.
        names: components.
        title: what stands above.
    """
    figure = new_figure(6.4, max(4.2, 2.0 + 0.17 * len(names)))
    upper, lower = figure.subplots(2, 1, height_ratios=[1, max(2.0, 0.16 * len(names))], sharex=True)
    _draw(upper, {kind: [interval] for kind, interval in circuit.items()}, ["circuit"])
    upper.set_title("the circuit: everything outside of it ablated", fontsize=FONT_SIZE, loc="left")
    _draw(lower, components, names)
    lower.set_title("one component ablated", fontsize=FONT_SIZE, loc="left")
    lower.set_xlabel("KL divergence from the clean model (nats)", fontsize=FONT_SIZE)
    upper.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=FONT_SIZE, frameon=False, title="ablation")
    figure.suptitle(title, fontsize=FONT_SIZE + 1)
    return figure


def _draw(axes: Axes, rows: Mapping[str, Sequence[Interval]], names: Sequence[str]) -> None:
    n_kinds = len(rows)
    for number, (kind, intervals) in enumerate(rows.items()):
        heights = np.arange(len(names)) + 0.22 * (number - (n_kinds - 1) / 2)
        means = np.array([max(interval.mean, SMALLEST_KL) for interval in intervals])
        low = np.array([max(interval.low, SMALLEST_KL) for interval in intervals])
        high = np.array([max(interval.high, SMALLEST_KL) for interval in intervals])
        colour = ABLATION_COLOURS.get(kind, "#CC79A7")
        axes.errorbar(
            means,
            heights,
            xerr=[np.maximum(means - low, 0), np.maximum(high - means, 0)],
            fmt="o",
            markersize=4,
            color=colour,
            label=kind,
            elinewidth=1.2,
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=FONT_SIZE - 1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=FONT_SIZE - 1)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
