"""Figure of several trained circuits: their KL divergence under every ablation, and their overlap."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from oa_train.figures.style import FONT_SIZE, new_figure, write_in_cells

# Divergences below this share a colour.
SMALLEST_KL = 1e-4


def agreement_figure(
    names: Sequence[str], kl: Mapping[str, Sequence[float]], jaccard: Sequence[Sequence[float]]
) -> Figure:
    """Two heat maps: KL divergence of each circuit under each ablation, and overlap of every pair of circuits.

    `kl` has divergences in nats, by ablation, and `jaccard` [circuit, circuit] overlaps between 0 and 1.
    """
    figure = new_figure(3.0 + 0.75 * len(kl) + 0.75 * len(names), max(2.6, 1.4 + 0.5 * len(names)))
    left, right = figure.subplots(1, 2, width_ratios=[len(kl), len(names)])
    numbers, ticks = [str(number) for number in range(1, len(names) + 1)], range(len(names))
    divergences = np.array(list(kl.values())).T
    smallest = max(float(divergences.min()) / 2, SMALLEST_KL)
    _table(left, divergences, LogNorm(smallest, max(float(divergences.max()), 10 * smallest)), "Oranges", "{:.2g}")
    left.set_xticks(range(len(kl)), [name.replace(" ", "\n", 1) for name in kl], fontsize=FONT_SIZE - 2)
    numbered = [f"{number}  {name}" for number, name in zip(numbers, names, strict=True)]
    left.set_yticks(ticks, numbered, fontsize=FONT_SIZE - 2)
    left.set_title("KL divergence (nats), tested under", fontsize=FONT_SIZE)
    _table(right, np.array(jaccard), Normalize(0, 1), "Blues", "{:.2f}")
    right.set_xticks(ticks, numbers, fontsize=FONT_SIZE - 2)
    right.set_yticks(ticks, numbers, fontsize=FONT_SIZE - 2)
    right.set_title("Jaccard overlap", fontsize=FONT_SIZE)
    return figure


def _table(axes: Axes, values: np.ndarray, norm: Normalize, colours: str, form: str) -> None:
    axes.imshow(np.maximum(values, norm.vmin or 0), norm=norm, cmap=colours, aspect="auto")
    write_in_cells(axes, [[form.format(value) for value in row] for row in values])
    axes.tick_params(length=0)
