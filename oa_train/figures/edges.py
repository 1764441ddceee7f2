"""Circuits of edges drawn as a graph."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from oa_train.figures.style import ABLATED, FONT_SIZE, KEPT, new_figure

# What an edge is read as. Distinguishable without red and green.
READ_AS: Mapping[str, tuple[str, str]] = {
    "q": ("query", "#D55E00"),
    "k": ("key", "#009E73"),
    "v": ("value", "#0072B2"),
    "": ("MLP or logits", "#777777"),
}
# Edges between the same two nodes would lie on each other; by what they are read as they bend differently.
BENDS = {"q": 0.04, "k": 0.13, "v": 0.22, "": 0.08}


def edge_drawing(
    n_layers: int, n_heads: int, edges: Sequence[tuple[str, str, str]], title: str, logits: str = "logits"
) -> Figure:
    """Draw a circuit of edges: input below, logits above, and in every layer its heads, and above them its MLP.

    Args:
        n_layers: layers of the model.
        n_heads: heads of a layer.
        edges: node that writes, node that reads, and as what (`q`, `k`, `v` or nothing).
        title: what stands above.
        logits: name of the node on top.
    """
    figure = new_figure(max(5.0, 0.8 * (n_heads + 2)), max(3.5, 1.5 * n_layers + 1.6))
    axes = figure.subplots()
    middle = (n_heads - 1) / 2
    places = {"input": (middle, -1.0), logits: (middle, 2.0 * n_layers)}
    for layer in range(n_layers):
        places |= {f"a{layer}.h{head}": (float(head), 2.0 * layer) for head in range(n_heads)}
        places[f"m{layer}"] = (n_heads - 0.1, 2.0 * layer + 0.9)
    used = {node for source, reader, _ in edges for node in (source, reader)}
    for source, reader, kind in edges:
        _arrow(axes, places[source], places[reader], kind)
    for name, place in places.items():
        _node(axes, place, name, name in used)
    kinds = [READ_AS[kind] for kind in READ_AS if any(kind == one[2] for one in edges)]
    lines = [
        Line2D([], [], color=colour, label=f"read as {name}" if name != READ_AS[""][0] else f"read by {name}")
        for name, colour in kinds
    ]
    if lines:
        axes.legend(handles=lines, fontsize=FONT_SIZE - 2, loc="upper left", frameon=False)
    axes.set_xlim(-1.0, n_heads + 0.7)
    axes.set_ylim(-1.5, 2.0 * n_layers + 0.5)
    axes.set_axis_off()
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    return figure


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
    bend = BENDS[kind] if start[0] <= end[0] else -BENDS[kind]
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=8,
            shrinkA=9,
            shrinkB=11,
            linewidth=1.0,
            color=READ_AS[kind][1],
            alpha=0.75,
            zorder=1,
        )
    )


def _node(axes: Axes, place: tuple[float, float], name: str, used: bool) -> None:
    box = {
        "boxstyle": "round,pad=0.25",
        "facecolor": KEPT if used else "white",
        "edgecolor": KEPT if used else ABLATED,
    }
    axes.text(
        *place,
        name,
        ha="center",
        va="center",
        fontsize=FONT_SIZE - 2,
        color="white" if used else "#999999",
        bbox=box,
        zorder=2,
    )
