"""The Pareto front of circuits: KL divergence against size."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from oa_train.figures.comparison import SMALLEST_KL, error_bars
from oa_train.figures.style import FONT_SIZE, ablation_style, legend_beside, new_figure, tidy
from oa_train.metrics.estimates import Estimate


def front_figure(
    sizes: Sequence[int], kl: Mapping[str, Sequence[Estimate]], n_parts: int, parts: str, title: str
) -> Figure:
    """KL divergence (nats) of circuits by size, with 95 % intervals; a line for each ablation of the rest.

    `parts` is the plural noun for what circuits keep, of which the model has `n_parts`.
    """
    figure = new_figure(6.2, 3.6, title)
    axes = figure.subplots()
    order = sorted(range(len(sizes)), key=lambda number: sizes[number])
    for ablation, intervals in kl.items():
        colour, marker = ablation_style(ablation)
        means, lengths = error_bars([intervals[number] for number in order], SMALLEST_KL)
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.0, "capsize": 2}
        axes.errorbar([sizes[number] for number in order], means, lengths, label=ablation.replace("_", " "), **style)
    axes.set_yscale("log")
    axes.set_xlabel(f"{parts} kept, of {n_parts}", fontsize=FONT_SIZE)
    axes.set_ylabel("KL divergence (nats)", fontsize=FONT_SIZE)
    tidy(axes)
    legend_beside(figure, "upper", title="everything else under", title_fontsize=FONT_SIZE - 1)
    return figure
