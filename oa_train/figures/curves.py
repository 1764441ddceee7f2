"""Behaviour of a model as a function of the ablated share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from oa_train.figures.comparison import draw_band
from oa_train.figures.style import FONT_SIZE, ablation_style, new_figure, tidy
from oa_train.metrics.estimates import Estimate

# Line styles of rankings, in order of appearance.
LINES: Sequence[Any] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))

# Maximum number of characters of a ranking's name in the legend.
MOST_CHARACTERS = 26

# The axis is logarithmic if divergences differ by more than this factor.
LOGARITHMIC_FROM = 30.0
# Below this divergence, in nats, the axis is linear down to zero.
SMALLEST_LINEAR = 1e-3


@dataclass(frozen=True)
class DrawnCurve:
    """A curve under one ablation in the order of one ranking, as an interval for each point."""

    ranking: str
    ablation: str
    label: str
    kl: Sequence[Estimate]
    accuracy: Sequence[Estimate]


def curve_figure(
    curves: Sequence[DrawnCurve], fractions: Sequence[float], title: str, order: str, bound: float | None = None
) -> Figure:
    """KL divergence and accuracy against the ablated share, with 95 % bands.

    Colours denote ablations, line styles denote rankings. `fractions` is the ablated share at each point, `order` is
    `the least` or `the most`, for the label of the axis, and `bound` is a KL divergence in nats to mark with a line.
    """
    figure = new_figure(8.6, 3.6, title)
    left, right = figure.subplots(1, 2, sharex=True)
    rankings = list(dict.fromkeys(curve.ranking for curve in curves))
    for curve in curves:
        colour, _ = ablation_style(curve.ablation)
        line = LINES[rankings.index(curve.ranking) % len(LINES)]
        for axes, points in ((left, curve.kl), (right, curve.accuracy)):
            draw_band(axes, fractions, points, colour, linestyle=line, linewidth=1.3)
    _scale(left, [point.mean for curve in curves for point in curve.kl])
    if bound is not None:
        left.axhline(bound, color="#555555", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        left.text(1.0, bound, f"{bound:g} nats", fontsize=FONT_SIZE - 2, va="bottom", ha="right", color="#555555")
    right.set_ylim(-0.03, 1.03)
    for axes, name in ((left, "KL divergence (nats)"), (right, "accuracy")):
        axes.set_ylabel(name, fontsize=FONT_SIZE)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        tidy(axes)
    figure.supxlabel(f"ablated, {order} important first", fontsize=FONT_SIZE)
    labels = {curve.ablation: curve.label for curve in curves}
    colours = [Line2D([], [], color=ablation_style(kind)[0], label=text) for kind, text in labels.items()]
    lines = [
        Line2D([], [], color="#333333", linestyle=LINES[number % len(LINES)], label=_shortened(name))
        for number, name in enumerate(rankings)
    ]
    place: dict[str, Any] = {"loc": "outside right upper", "frameon": False, "fontsize": FONT_SIZE - 1}
    figure.legend(handles=[*colours, *lines], handlelength=2.6, **place)
    return figure


def _scale(axes: Axes, means: Sequence[float]) -> None:
    """Use a symlog axis if the divergences differ by a large factor."""
    positive = [mean for mean in means if mean > 0]
    if positive and max(positive) > LOGARITHMIC_FROM * min(positive):
        axes.set_yscale("symlog", linthresh=max(SMALLEST_LINEAR, min(positive)), linscale=0.4)
    axes.set_ylim(bottom=0)


def _shortened(name: str) -> str:
    return name if len(name) <= MOST_CHARACTERS else f"...{name[3 - MOST_CHARACTERS :]}"
