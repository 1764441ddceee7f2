"""A circuit drawn as the model is built: layers from bottom to top, heads side by side, the MLP to their right."""

from collections.abc import Collection

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from oa_train.figures.style import ABLATED, FONT_SIZE, KEPT, new_figure


def circuit_drawing(n_layers: int, n_heads: int, kept: Collection[str], title: str) -> Figure:
    """Draw which heads and MLPs a circuit keeps.

    Args:
        n_layers: layers of the model.
        n_heads: heads of a layer.
        kept: names of the kept components (`a1.h3`, `m0`).
        title: what stands above.
    """
    figure = new_figure(max(4.0, 0.55 * (n_heads + 3)), max(2.6, 0.6 * (n_layers + 2)))
    axes = figure.subplots()
    for layer in range(n_layers):
        for head in range(n_heads):
            _box(axes, head, layer, f"h{head}", f"a{layer}.h{head}" in kept)
        _box(axes, n_heads + 0.5, layer, "MLP", f"m{layer}" in kept)
        axes.text(-0.8, layer, f"layer {layer}", ha="right", va="center", fontsize=FONT_SIZE)
    middle = (n_heads + 0.5) / 2
    axes.text(middle, -0.8, "token and position embedding", ha="center", va="center", fontsize=FONT_SIZE - 1)
    axes.text(middle, n_layers - 0.2, "logits", ha="center", va="center", fontsize=FONT_SIZE - 1)
    axes.set_xlim(-2.2, n_heads + 1.2)
    axes.set_ylim(-1.1, n_layers + 0.1)
    axes.set_axis_off()
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    return figure


def _box(axes: Axes, x: float, y: float, label: str, kept: bool) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - 0.36, y - 0.26),
            0.72,
            0.52,
            boxstyle="round,pad=0.02,rounding_size=0.1",
            facecolor=KEPT if kept else "white",
            edgecolor=KEPT if kept else ABLATED,
            linewidth=1.2,
        )
    )
    axes.text(x, y, label, ha="center", va="center", fontsize=FONT_SIZE - 1, color="white" if kept else "#999999")
