"""Running a model under masks of any level."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from oa_train.batches import Batch, TokenLayout
from oa_train.engine.edges.run import edge_row_bytes, edges_called, run_edges
from oa_train.engine.forward import scored_logits
from oa_train.engine.nodes import node_taps
from oa_train.engine.values import Values
from oa_train.models.families import Dimensions
from oa_train.models.graph import Graph
from oa_train.models.levels import Level
from oa_train.models.loading import CausalLM
from oa_train.models.selection import Nodes
from oa_train.models.taps import tapped
from oa_train.shapes import Float, Tensor


@dataclass(frozen=True)
class Engine:
    """Functions that run a model under masks of a level.

    Attributes:
        run: logits of a batch under masks, one per row.
        called: context in which one call of the model is masked.
        row_bytes: bytes of a row of a batch, with or without a backward pass.
    """

    run: Callable[[CausalLM, Batch, Any, Tensor, Values, bool], Tensor]
    called: Callable[[CausalLM, Any, Tensor, Values, TokenLayout], AbstractContextManager[None]]
    row_bytes: Callable[[CausalLM, Batch, bool], int]


def _run_nodes(model: CausalLM, batch: Batch, nodes: Nodes, mask: Tensor, values: Values, recompute: bool) -> Tensor:
    return scored_logits(model, batch, node_taps(model, nodes, mask, values, batch.layout), recompute)


@contextmanager
def _nodes_called(model: CausalLM, nodes: Nodes, mask: Tensor, values: Values, layout: TokenLayout) -> Iterator[None]:
    with tapped(node_taps(model, nodes, mask, values, layout)):
        yield


def _node_row_bytes(model: CausalLM, batch: Batch, gradients: bool) -> int:
    """About what a row's activations take: of one block, or of all that a backward pass goes through, and logits."""
    sizes, width = Dimensions.of(model.config), batch.tokens.shape[1]
    of_block = width * (10 * sizes.d_model + 4 * sizes.d_mlp + 2 * sizes.n_heads * width)
    vocabulary: int = model.config.vocab_size
    of_logits = 4 * batch.scored.shape[1] * vocabulary
    return ((sizes.n_layers if gradients else 1) * of_block + of_logits) * model.dtype.itemsize


ENGINES: dict[type[Level], Engine] = {
    Nodes: Engine(_run_nodes, _nodes_called, _node_row_bytes),
    Graph: Engine(run_edges, edges_called, edge_row_bytes),
}


def masked_logits(
    model: CausalLM,
    batch: Batch,
    level: Level,
    mask: Float[Tensor, "row entry"],
    values: Values,
    recompute: bool = False,
) -> Float[Tensor, "row scored vocabulary"]:
    """Logits at the scored positions with every entry of a level mixed with its replacement.

    Args:
        model: frozen causal language model.
        batch: one prompt for each row of the mask.
        level: level of the mask.
        mask: 1 keeps an entry, 0 ablates it; gradients flow to it.
        values: the replacements; they receive gradients only if the mask is below `ABLATED_BELOW`.
        recompute: activation checkpointing of the blocks (for edges: of the readers' inputs and the MLPs): less
            memory, more time, the same result.

    Raises:
        RuntimeError: in a second backward pass through a run of edges, which frees and overwrites what it needs.
    """
    return ENGINES[type(level)].run(model, batch, level, mask, values, recompute)


def masked_call(
    model: CausalLM, level: Level, mask: Float[Tensor, "row entry"], values: Values, layout: TokenLayout
) -> AbstractContextManager[None]:
    """Mask one call of a model with tokens of this layout, inside the context; see `masked_logits`."""
    return ENGINES[type(level)].called(model, level, mask, values, layout)
