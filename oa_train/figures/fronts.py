"""The front of circuits: what is lost against how much is kept."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from oa_train.figures.comparison import SMALLEST_KL, Interval
from oa_train.figures.style import FONT_SIZE, ablation_style, new_figure


def front_figure(
    sizes: Sequence[int], kl: Mapping[str, Sequence[Interval]], n_parts: int, what: str, title: str
) -> Figure:
    """KL divergence of circuits against their sizes, with 95 % intervals; a line for each ablation of the rest.

    Args:
        sizes: kept parts of each circuit.
        kl: by ablation, the divergence of each circuit from the clean model in nats.
        n_parts: parts of the model.
        what: what the parts are called.
        title: what stands above.
    """
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    order = sorted(range(len(sizes)), key=lambda number: sizes[number])
    for ablation, intervals in kl.items():
        colour, marker = ablation_style(ablation)
        means = [max(intervals[number].mean, SMALLEST_KL) for number in order]
        low = [mean - max(intervals[number].low, SMALLEST_KL) for mean, number in zip(means, order, strict=True)]
        high = [intervals[number].high - mean for mean, number in zip(means, order, strict=True)]
        axes.errorbar(
            [sizes[number] for number in order],
            means,
            yerr=[[max(below, 0.0) for below in low], [max(above, 0.0) for above in high]],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.0,
            capsize=2,
            label=ablation.replace("_", " "),
        )
    axes.set_yscale("log")
    axes.set_xlabel(f"{what} kept, of {n_parts}", fontsize=FONT_SIZE)
    axes.set_ylabel("KL divergence (nats)", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(alpha=0.3, linewidth=0.5)
    legend = axes.legend(fontsize=FONT_SIZE - 1, title="everything else under", frameon=False)
    legend.get_title().set_fontsize(FONT_SIZE - 1)
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    return figure
