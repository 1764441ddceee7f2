"""A circuit drawn like the model: layers from bottom to top, heads side by side, the MLP to their right.

Node circuits are drawn with boxes, edge circuits with arrows.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from oa_train.figures.style import ABLATED, FONT_SIZE, KEPT, new_figure, write

# Legend and colour of edges by kind of reader; the colours are safe for red-green colour blindness.
READ_AS: Mapping[str, tuple[str, str]] = {
    "q": ("read as query", "#D55E00"),
    "k": ("read as key", "#009E73"),
    "v": ("read as value", "#0072B2"),
    "": ("read by MLP or logits", "#777777"),
}
# Curvature of edges by kind of reader, so that edges between the same two nodes do not overlap.
BENDS = {"q": 0.04, "k": 0.13, "v": 0.22, "": 0.08}


def circuit_drawing(n_layers: int, n_heads: int, kept: Collection[str], title: str) -> Figure:
    """Draw which heads and MLPs (`a1.h3`, `m0`) a circuit keeps, out of `n_layers` layers of `n_heads` heads.

    Layer 0 is at the bottom.
    """
    # Deep models are drawn with less spacing, so that the figure fits a page.
    height = 0.6 if n_layers <= 12 else 0.34
    figure = new_figure(min(max(4.0, 0.55 * (n_heads + 3)), 18.0), max(2.6, height * (n_layers + 2)), title)
    axes = figure.subplots()
    for layer in range(n_layers):
        for head in range(n_heads):
            _box(axes, head, layer, f"h{head}", f"a{layer}.h{head}" in kept)
        _box(axes, n_heads + 0.5, layer, "MLP", f"m{layer}" in kept)
        axes.text(-0.8, layer, f"layer {layer}", ha="right", va="center", fontsize=FONT_SIZE)
    middle = (n_heads + 0.5) / 2
    write(axes, middle, -0.8, "embedding", FONT_SIZE - 1)
    write(axes, middle, n_layers - 0.2, "logits", FONT_SIZE - 1)
    axes.set_xlim(-2.2, n_heads + 1.2)
    axes.set_ylim(-1.1, n_layers + 0.1)
    axes.set_axis_off()
    return figure


def _box(axes: Axes, x: float, y: float, label: str, kept: bool) -> None:
    face, edge, text = (KEPT, KEPT, "white") if kept else ("white", ABLATED, "#999999")
    shape = "round,pad=0.02,rounding_size=0.1"
    corner = (x - 0.36, y - 0.26)
    axes.add_patch(FancyBboxPatch(corner, 0.72, 0.52, shape, facecolor=face, edgecolor=edge, linewidth=1.2))
    write(axes, x, y, label, FONT_SIZE - 1, color=text)


def edge_drawing(n_layers: int, n_heads: int, edges: Sequence[tuple[str, str, str]], title: str) -> Figure:
    """Draw an edge circuit: the input at the bottom, the logits on top, and in each layer the MLP above the heads.

    Each edge is its source node, its reader node, and what is read (`q`, `k`, `v` or an empty string).
    """
    figure = new_figure(max(5.0, 0.8 * (n_heads + 2)), max(3.5, 1.5 * n_layers + 1.6), title)
    axes = figure.subplots()
    middle = (n_heads - 1) / 2
    places = {"input": (middle, -1.0), "logits": (middle, 2.0 * n_layers)}
    for layer in range(n_layers):
        places |= {f"a{layer}.h{head}": (float(head), 2.0 * layer) for head in range(n_heads)}
        places[f"m{layer}"] = (n_heads - 0.1, 2.0 * layer + 0.9)
    for source, reader, kind in edges:
        _arrow(axes, places[source], places[reader], kind)
    used = {node for source, reader, _ in edges for node in (source, reader)}
    for name, place in places.items():
        face, edge, text = (KEPT, KEPT, "white") if name in used else ("white", ABLATED, "#999999")
        box: dict[str, Any] = {"boxstyle": "round,pad=0.25", "facecolor": face, "edgecolor": edge}
        write(axes, *place, name, color=text, bbox=box, zorder=2)
    kinds = {kind for _, _, kind in edges}
    lines = [Line2D([], [], color=colour, label=label) for kind, (label, colour) in READ_AS.items() if kind in kinds]
    if lines:
        axes.legend(handles=lines, fontsize=FONT_SIZE - 2, loc="upper left", frameon=False)
    axes.set_xlim(-1.0, n_heads + 0.7)
    axes.set_ylim(-1.5, 2.0 * n_layers + 0.5)
    axes.set_axis_off()
    return figure


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
    bend = BENDS[kind] if start[0] <= end[0] else -BENDS[kind]
    lines: dict[str, Any] = {"color": READ_AS[kind][1], "linewidth": 1.0, "alpha": 0.75, "zorder": 1}
    shape: dict[str, Any] = {"connectionstyle": f"arc3,rad={bend}", "arrowstyle": "-|>", "mutation_scale": 8}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=9, shrinkB=11, **shape, **lines))
