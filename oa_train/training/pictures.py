"""Figures of masks and circuits of any level."""

from oa_train.circuits.circuit import Circuit
from oa_train.figures.circuits import circuit_drawing
from oa_train.figures.edges import edge_drawing
from oa_train.figures.maps import score_map
from oa_train.figures.style import Figure
from oa_train.models.levels import Level
from oa_train.shapes import Float, Tensor

# Drawings of more edges are illegible.
MOST_EDGES_DRAWN = 400


def score_picture(level: Level, scores: Float[Tensor, " entry"], threshold: float) -> Figure:
    """Keep-probability of every entry of a level.

    Args:
        level: what the scores are of.
        scores: keep-probabilities, in mask order.
        threshold: entries above it are kept.
    """
    laid_out = level.score_map(scores)
    axes = laid_out.row_axis, laid_out.column_axis
    return score_map(laid_out.table.numpy(), laid_out.rows, laid_out.columns, axes, threshold)


def circuit_picture(circuit: Circuit, title: str) -> Figure | None:
    """The circuit drawn as the model is built; None for circuits that cannot be drawn legibly."""
    grid, arrows = circuit.level.grid, circuit.level.arrows(circuit.mask)
    if grid is None or (arrows is not None and len(arrows) > MOST_EDGES_DRAWN):
        return None
    if arrows is None:
        return circuit_drawing(*grid, circuit.names, title)
    return edge_drawing(*grid, arrows, title)
