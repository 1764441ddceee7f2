"""Heat maps over layers and components."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from oa_train.figures.style import FONT_SIZE, new_figure

# Beyond this many cells numbers in them cannot be read.
MOST_LABELLED = 200


def keep_probability_map(probabilities: np.ndarray, n_heads: int, threshold: float) -> Figure:
    """Keep-probability of every head and MLP, a row a layer; framed where it exceeds the threshold.

    Args:
        probabilities: [component] values between 0 and 1, in mask order.
        n_heads: heads of a layer.
        threshold: components above it are in the circuit.
    """
    table = probabilities.reshape(-1, n_heads + 1)
    n_layers = len(table)
    figure = new_figure(max(3.6, 0.42 * (n_heads + 3)), max(2.2, 0.36 * n_layers + 1.0))
    axes = figure.subplots()
    image = axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(n_heads + 1), [f"h{head}" for head in range(n_heads)] + ["MLP"], fontsize=FONT_SIZE - 1)
    axes.set_yticks(range(n_layers), [str(layer) for layer in range(n_layers)], fontsize=FONT_SIZE - 1)
    axes.set_ylabel("layer", fontsize=FONT_SIZE)
    for layer, column in np.argwhere(table > threshold):
        axes.add_patch(_frame(int(column), int(layer)))
    if table.size <= MOST_LABELLED:
        for layer in range(n_layers):
            for column in range(n_heads + 1):
                value = table[layer, column]
                colour = "white" if value > 0.6 else "black"
                axes.text(
                    column, layer, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=FONT_SIZE - 2
                )
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("keep-probability", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1)
    axes.set_title(f"framed: above the threshold {threshold:g}", fontsize=FONT_SIZE)
    return figure


def _frame(column: int, row: int) -> Rectangle:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.2)
