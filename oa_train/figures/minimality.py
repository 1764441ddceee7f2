"""Worth of each part of a circuit: the increase in KL divergence without it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oa_train.figures.comparison import MOST_ROWS, error_bars
from oa_train.figures.style import FONT_SIZE, new_figure, tidy
from oa_train.metrics.estimates import Estimate

COLOURS: Mapping[str, str] = {"needed": "#0072B2", "undecided": "#999999", "superfluous": "#D55E00"}

# The axis is symlog: linear between minus and plus this value, or the tolerance if that is larger.
LINEAR_BELOW = 1e-4


def worth_figure(
    names: Sequence[str], worth: Sequence[Estimate], verdicts: Sequence[str], tolerance: float, title: str
) -> Figure:
    """Increase in KL divergence, in nats, when a part is removed, with 95 % intervals.

    The parts are in descending order of worth; the first ones have a row each. The verdicts are keys of `COLOURS`. The
    tolerance, a worth that counts as negligible, is drawn as a line.
    """
    n_rows = min(len(names), MOST_ROWS)
    shortened = len(names) > n_rows
    figure = new_figure(9.0 if shortened else 6.0, 1.2 + 0.17 * max(n_rows, 6), title)
    rows, *ranks = figure.subplots(1, 2 if shortened else 1, sharex=True, squeeze=False)[0]
    _draw(rows, worth[:n_rows], verdicts[:n_rows], tolerance)
    rows.set_yticks(range(1, n_rows + 1), names[:n_rows], fontsize=FONT_SIZE - 1)
    for axes in ranks:
        rows.set_title(f"the {n_rows} that are worth most", fontsize=FONT_SIZE, loc="left")
        _draw(axes, worth, verdicts, tolerance)
        axes.set_title(f"all {len(names)}, by rank", fontsize=FONT_SIZE, loc="left")
    # The parts of greatest worth are on top, so this corner is free; the last axes have all verdicts.
    (ranks or [rows])[-1].legend(loc="lower right", fontsize=FONT_SIZE - 1)
    figure.supxlabel("KL divergence without the part minus that of the whole circuit (nats)", fontsize=FONT_SIZE)
    return figure


def _draw(axes: Axes, worth: Sequence[Estimate], verdicts: Sequence[str], tolerance: float) -> None:
    for verdict, colour in COLOURS.items():
        ranks = [rank for rank in range(len(worth)) if verdicts[rank] == verdict]
        if ranks:
            means, lengths = error_bars([worth[rank] for rank in ranks])
            style: dict[str, Any] = {
                "fmt": "o",
                "markersize": 4 if len(worth) <= 2 * MOST_ROWS else 2,
                "elinewidth": 1.0,
            }
            label = f"{verdict} ({len(ranks)})"
            axes.errorbar(means, np.add(ranks, 1), xerr=lengths, color=colour, label=label, **style)
    axes.set_xscale("symlog", linthresh=max(tolerance, LINEAR_BELOW))
    axes.axvline(0, color="#555555", linewidth=0.8, zorder=0)
    axes.axvline(tolerance, color="#555555", linewidth=0.8, linestyle=":", zorder=0, label=f"tolerance {tolerance:g}")
    axes.set_ylim(len(worth) + 0.5, 0.5)
    tidy(axes, "x")
