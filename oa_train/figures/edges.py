"""Edge circuits drawn as graphs."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from oa_train.figures.style import ABLATED, FONT_SIZE, KEPT, new_figure, set_title, write

# Legend and colour of edges by kind of reader; the colours are safe for red-green colour blindness.
READ_AS: Mapping[str, tuple[str, str]] = {
    "q": ("read as query", "#D55E00"),
    "k": ("read as key", "#009E73"),
    "v": ("read as value", "#0072B2"),
    "": ("read by MLP or logits", "#777777"),
}
# Curvature of edges by kind of reader, so that edges between the same two nodes do not overlap.
BENDS = {"q": 0.04, "k": 0.13, "v": 0.22, "": 0.08}


def edge_drawing(
    n_layers: int, n_heads: int, edges: Sequence[tuple[str, str, str]], title: str, logits: str = "logits"
) -> Figure:
    """Draw an edge circuit: the input at the bottom, the logits on top, and in each layer the MLP above the heads.

    Args:
        n_layers: number of layers of the model.
        n_heads: number of heads in a layer.
        edges: source node, reader node, and what is read (`q`, `k`, `v` or an empty string).
        title: title of the figure.
        logits: name of the node on top.
    """
    figure = new_figure(max(5.0, 0.8 * (n_heads + 2)), max(3.5, 1.5 * n_layers + 1.6))
    axes = figure.subplots()
    middle = (n_heads - 1) / 2
    places = {"input": (middle, -1.0), logits: (middle, 2.0 * n_layers)}
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
    set_title(figure, title)
    return figure


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
    bend = BENDS[kind] if start[0] <= end[0] else -BENDS[kind]
    lines: dict[str, Any] = {"color": READ_AS[kind][1], "linewidth": 1.0, "alpha": 0.75, "zorder": 1}
    shape: dict[str, Any] = {"connectionstyle": f"arc3,rad={bend}", "arrowstyle": "-|>", "mutation_scale": 8}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=9, shrinkB=11, **shape, **lines))
