"""Ablations side by side: circuits above, components alone below."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oa_train.figures.style import FONT_SIZE, ablation_style, legend_beside, new_figure, tidy
from oa_train.metrics.estimates import Estimate

# Lower end of the logarithmic axis of divergences; smaller ones are drawn there.
SMALLEST_KL = 1e-5

# More rows than this are illegible on a page; only those that matter most are shown.
MOST_ROWS = 30

RANDOM_CIRCUITS = "random circuits,\noptimal"


def error_bars(estimates: Sequence[Estimate], smallest: float = -np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Means, and lengths of the error bars of 95 % intervals [below or above, mean], both clipped at `smallest`."""
    ends = np.array([(estimate.mean, *estimate.ci95) for estimate in estimates])
    means, low, high = np.maximum(ends, smallest).T
    return means, np.maximum([means - low, high - means], 0)


def draw_band(axes: Axes, places: Sequence[float], estimates: Sequence[Estimate], colour: str, **line: Any) -> None:
    """A line through the means, in a pale band of their 95 % intervals."""
    means, low, high = np.array([(estimate.mean, *estimate.ci95) for estimate in estimates]).T
    axes.plot(places, means, color=colour, **line)
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


@dataclass(frozen=True)
class Panel:
    """One panel of the figure.

    Attributes:
        title: title above the panel.
        names: names of the rows.
        rows: intervals of each ablation, in the order of `names`.
        ranked: whether to sort the rows by effect under the first ablation, largest on top, and draw only as many as
            are legible.
    """

    title: str
    names: Sequence[str]
    rows: Mapping[str, Sequence[Estimate]]
    ranked: bool = False

    def in_order(self) -> "Panel":
        """The panel with its rows in the order in which they are drawn."""
        if not self.ranked or not self.names:
            return self
        first = next(iter(self.rows.values()))
        chosen = np.argsort([-interval.mean for interval in first], kind="stable")[:MOST_ROWS].tolist()
        n_rows = len(self.names)
        return Panel(
            title=self.title + (f": the {MOST_ROWS} of {n_rows} that matter most" if n_rows > MOST_ROWS else ""),
            names=[self.names[i] for i in chosen],
            rows={kind: [intervals[i] for i in chosen] for kind, intervals in self.rows.items()},
        )


@dataclass(frozen=True)
class Control:
    """KL divergences of a run's circuit and of random circuits after the same training; `name` labels the row."""

    name: str
    run_kl: float
    random_kl: Sequence[float]


def comparison_figure(
    panels: Sequence[Panel], title: str, labels: Mapping[str, str] | None = None, controls: Sequence[Control] = ()
) -> Figure:
    """KL divergence under each ablation, with 95 % intervals; panels with a common axis, and controls at the bottom.

    Panels without rows are left out. `labels` are the ablations' labels in the legend, by default their names.
    """
    shown = [panel.in_order() for panel in panels if panel.names]
    n_kinds = max(len(panel.rows) for panel in shown)
    heights = [max(0.8, (0.1 + 0.05 * n_kinds) * len(panel.names) + 0.3) for panel in shown]
    if controls:
        heights.append(0.5 + 0.3 * len(controls))
    figure = new_figure(7.0, 1.4 + sum(heights), title)
    drawn = figure.subplots(len(heights), 1, height_ratios=heights, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(drawn, shown, strict=False):
        _draw(axes, panel, labels or {kind: kind for kind in panel.rows})
    if controls:
        _draw_controls(drawn[-1], controls)
    drawn[-1].set_xlabel("KL divergence from the clean model (nats)", fontsize=FONT_SIZE)
    legend_beside(figure, "upper", title="ablation")
    return figure


def _draw(axes: Axes, panel: Panel, labels: Mapping[str, str]) -> None:
    rows, names = panel.rows, panel.names
    spacing = 0.8 / max(1, len(rows))
    for number, (kind, intervals) in enumerate(rows.items()):
        heights = np.arange(len(names)) + min(0.22, spacing) * (number - (len(rows) - 1) / 2)
        means, lengths = error_bars(intervals, SMALLEST_KL)
        colour, marker = ablation_style(kind)
        # Ablations that are not total have hollow markers.
        style: dict[str, Any] = {"color": colour, "markerfacecolor": "white" if "not total" in labels[kind] else None}
        style |= {"fmt": marker, "markersize": 4, "elinewidth": 1.0}
        axes.errorbar(means, heights, xerr=lengths, label=labels[kind], **style)
    _lay_out(axes, panel.title, names)


def _draw_controls(axes: Axes, controls: Sequence[Control]) -> None:
    for row, control in enumerate(controls):
        clipped = np.maximum(control.random_kl, SMALLEST_KL)
        axes.plot(clipped, np.full(len(clipped), row), "|", color="#999999", label=RANDOM_CIRCUITS)
        colour, marker = ablation_style("optimal")
        axes.plot(max(control.run_kl, SMALLEST_KL), row, marker, color=colour, markersize=4)
    title = "random circuits and the run's (blue), constants trained alike"
    _lay_out(axes, title, [control.name for control in controls])


def _lay_out(axes: Axes, title: str, names: Sequence[str]) -> None:
    axes.set_title(title, fontsize=FONT_SIZE, loc="left")
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for boundary in range(1, len(names)):
        axes.axhline(boundary - 0.5, color="#EEEEEE", linewidth=0.8, zorder=0)
    tidy(axes, "x")
