"""The Pareto front of circuits: KL divergence against size."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from oa_train.figures.comparison import SMALLEST_KL, Interval, error_bars
from oa_train.figures.style import FONT_SIZE, ablation_style, new_figure, set_title


def front_figure(
    sizes: Sequence[int], kl: Mapping[str, Sequence[Interval]], n_parts: int, parts: str, title: str
) -> Figure:
    """KL divergence of circuits against their sizes, with 95 % intervals; a line for each ablation of the rest.

    Args:
        sizes: number of kept parts of each circuit.
        kl: KL divergence of each circuit from the clean model in nats, by ablation.
        n_parts: number of parts of the model.
        parts: plural noun for the parts.
        title: title of the figure.
    """
    figure = new_figure(6.2, 3.6)
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
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(alpha=0.3, linewidth=0.5)
    small = FONT_SIZE - 1
    where: dict[str, Any] = {"loc": "outside right upper", "frameon": False, "fontsize": small}
    figure.legend(title="everything else under", title_fontsize=small, **where)
    set_title(figure, title)
    return figure
