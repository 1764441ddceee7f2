"""Behaviour of a model as a function of the ablated share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from oa_train.figures.comparison import Interval
from oa_train.figures.style import FONT_SIZE, ablation_style, new_figure, set_title

# Line styles of rankings, in order of appearance.
LINES: Sequence[Any] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))

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
    kl: Sequence[Interval]
    accuracy: Sequence[Interval]


def curve_figure(
    curves: Sequence[DrawnCurve], fractions: Sequence[float], title: str, order: str, bound: float | None = None
) -> Figure:
    """KL divergence and accuracy against the ablated share, with 95 % bands.

    Colours denote ablations, line styles denote rankings.

    Args:
        curves: the curves to draw.
        fractions: ablated share at each point.
        title: title of the figure.
        order: `the least` or `the most`, for the label of the axis.
        bound: KL divergence in nats to mark with a horizontal line.
    """
    figure = new_figure(8.6, 3.6)
    left, right = figure.subplots(1, 2, sharex=True)
    rankings = list(dict.fromkeys(curve.ranking for curve in curves))
    for curve in curves:
        line = LINES[rankings.index(curve.ranking) % len(LINES)]
        _draw(left, fractions, curve.kl, curve.ablation, line)
        _draw(right, fractions, curve.accuracy, curve.ablation, line)
    _scale(left, [point.mean for curve in curves for point in curve.kl])
    if bound is not None:
        left.axhline(bound, color="#555555", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        left.text(1.0, bound, f"{bound:g} nats", fontsize=FONT_SIZE - 2, va="bottom", ha="right", color="#555555")
    right.set_ylim(-0.03, 1.03)
    for axes, name in ((left, "KL divergence (nats)"), (right, "accuracy")):
        axes.set_ylabel(name, fontsize=FONT_SIZE)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.tick_params(labelsize=FONT_SIZE - 1)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"ablated, {order} important first", fontsize=FONT_SIZE)
    labels = {curve.ablation: curve.label for curve in curves}
    colours = [Line2D([], [], color=ablation_style(kind)[0], label=text) for kind, text in labels.items()]
    lines = [
        Line2D([], [], color="#333333", linestyle=LINES[number % len(LINES)], label=_shortened(name))
        for number, name in enumerate(rankings)
    ]
    place: dict[str, Any] = {"loc": "outside right upper", "frameon": False, "fontsize": FONT_SIZE - 1}
    figure.legend(handles=[*colours, *lines], handlelength=2.6, **place)
    set_title(figure, title)
    return figure


def _draw(axes: Axes, fractions: Sequence[float], points: Sequence[Interval], ablation: str, line: Any) -> None:
    colour, _ = ablation_style(ablation)
    axes.plot(fractions, [point.mean for point in points], color=colour, linestyle=line, linewidth=1.3)
    low, high = [point.low for point in points], [point.high for point in points]
    axes.fill_between(fractions, low, high, color=colour, alpha=0.1, linewidth=0)


def _scale(axes: Axes, means: Sequence[float]) -> None:
    """Use a symlog axis if the divergences differ by a large factor."""
    positive = [mean for mean in means if mean > 0]
    if positive and max(positive) > LOGARITHMIC_FROM * min(positive):
        axes.set_yscale("symlog", linthresh=max(SMALLEST_LINEAR, min(positive)), linscale=0.4)
    axes.set_ylim(bottom=0)


def _shortened(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
