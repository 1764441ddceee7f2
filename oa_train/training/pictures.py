"""Pictures of masks and circuits, of components or of edges."""

import torch

from oa_train.circuits.circuit import Circuit
from oa_train.figures.circuits import circuit_drawing
from oa_train.figures.edges import edge_drawing, edge_map
from oa_train.figures.maps import keep_probability_map
from oa_train.figures.style import Figure
from oa_train.models.selection import Components
from oa_train.models.graph import Graph
from oa_train.shapes import Float, Tensor

# Drawings of more edges are one dark patch.
MOST_EDGES_DRAWN = 400


def probability_picture(parts: Components | Graph, scores: Float[Tensor, " entry"], threshold: float) -> Figure:
    """Keep-probability of every component or edge.

    Args:
        parts: of the model.
        scores: keep-probabilities, in mask order.
        threshold: what is above it is kept.
    """
    if isinstance(parts, Components):
        return keep_probability_map(scores.cpu().numpy(), parts.n_heads, threshold)
    table = torch.full((parts.n_readers, parts.n_sources), torch.nan)
    table[parts.edge_readers, parts.edge_sources] = scores.cpu().float()
    return edge_map(table.numpy(), parts.sources, parts.readers, threshold)


def circuit_picture(circuit: Circuit, title: str) -> Figure | None:
    """The circuit as the model is built; None for one of so many edges that a drawing shows nothing."""
    sizes = circuit.components
    if not isinstance(circuit.parts, Graph):
        return circuit_drawing(sizes.n_layers, sizes.n_heads, circuit.names, title)
    if len(circuit) > MOST_EDGES_DRAWN:
        return None
    return edge_drawing(sizes.n_layers, sizes.n_heads, circuit.parts.node_edges(circuit.names), title)
