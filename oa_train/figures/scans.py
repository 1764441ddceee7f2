"""Effects of every part of a model under several ablations: heat maps, and ratios to optimal ablation."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from oa_train.figures.comparison import SMALLEST_KL
from oa_train.figures.style import FONT_SIZE, ablation_style, new_figure

# With more rows or columns than this, only some of them are named.
MOST_NAMED = 24
# Maximum number of maps side by side.
MOST_COLUMNS = 4


def effect_maps(
    tables: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    axes_names: tuple[str, str],
    title: str,
) -> Figure:
    """A heat map of KL divergences for each ablation, with a common logarithmic scale; the first row at the bottom.

    `tables` has [row, column] divergences in nats, by ablation; NaN where there is no part. `axes_names` are the
    labels of the axes, first that of the rows.
    """
    n_across = min(MOST_COLUMNS, len(tables))
    n_down = -(-len(tables) // n_across)
    width = min(max(1.8, 0.17 * len(columns)), 4.0)
    height = min(max(1.6, 0.13 * len(rows)), 6.0)
    figure = new_figure(n_across * width + 1.6, n_down * (height + 0.4) + 0.6, title)
    grid = figure.subplots(n_down, n_across, squeeze=False, sharex=True, sharey=True)
    values = np.concatenate([table[~np.isnan(table)] for table in tables.values()])
    lowest = max(SMALLEST_KL, float(np.percentile(values, 10)))
    norm = LogNorm(lowest, max(10 * lowest, float(values.max())))
    for axes in grid.flat[len(tables) :]:
        axes.set_axis_off()
    for axes, (name, table) in zip(grid.flat, tables.items(), strict=False):
        clipped = np.where(np.isnan(table), np.nan, np.maximum(table, lowest))
        image = axes.imshow(clipped, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest", origin="lower")
        axes.set_facecolor("#F2F2F2")
        axes.set_title(name, fontsize=FONT_SIZE)
        below = axes.get_subplotspec().rowspan.stop * n_across + axes.get_subplotspec().colspan.start
        axes.tick_params(labelbottom=below >= len(tables))
        for names, set_ticks, turned in ((columns, axes.set_xticks, 90), (rows, axes.set_yticks, 0)):
            step = 1 + (len(names) - 1) // MOST_NAMED
            set_ticks(range(0, len(names), step), names[::step], fontsize=FONT_SIZE - 3, rotation=turned)
    for axes in grid[:, 0]:
        axes.set_ylabel(axes_names[0], fontsize=FONT_SIZE - 1)
    figure.colorbar(image, ax=grid, shrink=0.8).set_label("KL divergence (nats)", fontsize=FONT_SIZE - 1)
    return figure


def gap_figure(ratios: Mapping[str, np.ndarray], title: str) -> Figure:
    """Cumulative distribution over parts of the ratio of each ablation's KL divergence to that of optimal ablation.

    `ratios` has the ratio of each part, positive, by ablation.
    """
    figure = new_figure(5.6, 3.2, title)
    axes = figure.subplots()
    for name, values in ratios.items():
        colour, _ = ablation_style(name)
        axes.ecdf(
            values, color=colour, linewidth=1.2, label=f"{name.replace('_', ' ')}, median {np.median(values):.3g}"
        )
    axes.set_xscale("log")
    axes.axvline(1, color="#555555", linewidth=0.8, zorder=0)
    axes.set_xlabel("KL divergence over that of optimal ablation", fontsize=FONT_SIZE)
    axes.set_ylabel("share of the units", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.legend(fontsize=FONT_SIZE - 2, frameon=False, loc="lower right")
    return figure
