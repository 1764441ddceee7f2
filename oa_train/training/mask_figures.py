"""Figures of masks and circuits of any level."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from oa_train.circuits.circuit import Circuit
from oa_train.figures.circuits import circuit_drawing, edge_drawing
from oa_train.figures.maps import count_map, score_map
from oa_train.figures.style import Figure
from oa_train.models.levels import Level
from oa_train.shapes import Float, Tensor

# Drawings with more edges are illegible.
MOST_EDGES_DRAWN = 400


def score_picture(level: Level, scores: Float[Tensor, " entry"], threshold: float) -> Figure:
    """Keep-probability of every entry of a level; those above the threshold are kept."""
    laid_out = level.score_map(scores)
    axes = laid_out.row_axis, laid_out.column_axis
    return score_map(laid_out.table.numpy(), laid_out.rows, laid_out.columns, axes, threshold)


def circuit_picture(circuit: Circuit, title: str) -> Figure | None:
    """A drawing of the circuit in the layout of the model, or its edge counts by node if edges are many, or None."""
    grid, arrows = circuit.level.grid, circuit.level.arrows(circuit.mask)
    if grid is None:
        return None
    if arrows is not None and len(arrows) > MOST_EDGES_DRAWN:
        return _edges_at_nodes(*grid, arrows, title)
    if arrows is None:
        return circuit_drawing(*grid, circuit.names, title)
    return edge_drawing(*grid, arrows, title)


def _edges_at_nodes(n_layers: int, n_heads: int, arrows: Sequence[tuple[str, str, str]], title: str) -> Figure:
    ends = Counter(node for source, reader, _ in arrows for node in (source, reader))
    nodes = [[*(f"a{layer}.h{head}" for head in range(n_heads)), f"m{layer}"] for layer in range(n_layers)]
    table = np.array([[ends[node] for node in layer] for layer in nodes], dtype=float)
    columns = [*(f"h{head}" for head in range(n_heads)), "MLP"]
    return count_map(table, columns, "edges that leave or enter", title)
