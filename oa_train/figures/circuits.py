"""A circuit drawn like the model: layers from bottom to top, heads side by side, the MLP to their right."""

from collections.abc import Collection

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from oa_train.figures.style import ABLATED, FONT_SIZE, KEPT, new_figure, set_title, write


def circuit_drawing(
    n_layers: int, n_heads: int, kept: Collection[str], title: str, embedding: str = "embedding"
) -> Figure:
    """Draw which heads and MLPs (`a1.h3`, `m0`) a circuit keeps, out of `n_layers` layers of `n_heads` heads.

    Layer 0 is at the bottom, with the name of the embedding below it.
    """
    # Deep models are drawn with less spacing, so that the figure fits a page.
    height = 0.6 if n_layers <= 12 else 0.34
    figure = new_figure(min(max(4.0, 0.55 * (n_heads + 3)), 18.0), max(2.6, height * (n_layers + 2)))
    axes = figure.subplots()
    for layer in range(n_layers):
        for head in range(n_heads):
            _box(axes, head, layer, f"h{head}", f"a{layer}.h{head}" in kept)
        _box(axes, n_heads + 0.5, layer, "MLP", f"m{layer}" in kept)
        axes.text(-0.8, layer, f"layer {layer}", ha="right", va="center", fontsize=FONT_SIZE)
    middle = (n_heads + 0.5) / 2
    write(axes, middle, -0.8, embedding, FONT_SIZE - 1)
    write(axes, middle, n_layers - 0.2, "logits", FONT_SIZE - 1)
    axes.set_xlim(-2.2, n_heads + 1.2)
    axes.set_ylim(-1.1, n_layers + 0.1)
    axes.set_axis_off()
    set_title(figure, title)
    return figure


def _box(axes: Axes, x: float, y: float, label: str, kept: bool) -> None:
    face, edge, text = (KEPT, KEPT, "white") if kept else ("white", ABLATED, "#999999")
    shape = "round,pad=0.02,rounding_size=0.1"
    corner = (x - 0.36, y - 0.26)
    axes.add_patch(FancyBboxPatch(corner, 0.72, 0.52, shape, facecolor=face, edgecolor=edge, linewidth=1.2))
    write(axes, x, y, label, FONT_SIZE - 1, color=text)
