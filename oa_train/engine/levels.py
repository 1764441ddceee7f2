"""Running a model under masks of any level."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from oa_train.batches import Batch, TokenLayout
from oa_train.engine.edges.run import edge_row_bytes, edges_called, run_edges
from oa_train.engine.forward import scored_logits
from oa_train.engine.nodes import node_taps
from oa_train.engine.prefix import own_blocks, prefix_logits, saved_share
from oa_train.engine.values import Values
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.hooks import tapped
from oa_train.models.levels import Level
from oa_train.models.selection import Nodes
from oa_train.shapes import Bool, Float, Tensor


@dataclass(frozen=True)
class Engine:
    """Functions that run a model under masks of a level.

    Attributes:
        run: logits of a batch under masks, one for each row.
        called: context in which one call of the model is masked.
        circuits: logits of several circuits on the same prompts, and those of the clean model if the run has them.
        row_bytes: estimated bytes that `circuits` takes for one prompt, by circuit, with or without a backward pass.
    """

    run: Callable[[CausalLM, Batch, Any, Tensor, Values, bool], Tensor]
    called: Callable[[CausalLM, Any, Tensor, Values, TokenLayout], AbstractContextManager[None]]
    circuits: Callable[[CausalLM, Batch, Any, Tensor, Values, bool], tuple[Tensor, Tensor | None]]
    row_bytes: Callable[[CausalLM, Batch, Any, Tensor, bool], list[int]]


def _run_nodes(model: CausalLM, batch: Batch, nodes: Nodes, mask: Tensor, values: Values, recompute: bool) -> Tensor:
    return scored_logits(model, batch, node_taps(model, nodes, mask, values, batch.layout), recompute)


def _nodes_called(
    model: CausalLM, nodes: Nodes, mask: Tensor, values: Values, layout: TokenLayout
) -> AbstractContextManager[None]:
    return tapped(node_taps(model, nodes, mask, values, layout))


def _node_circuits(
    model: CausalLM, batch: Batch, nodes: Nodes, masks: Tensor, values: Values, recompute: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows of a circuit join the run where it first ablates something, if that saves work."""
    if recompute or not _shares(model, nodes, masks):
        rows, mask = _repeated(batch, masks)
        return _run_nodes(model, rows, nodes, mask, values, recompute), None
    logits = prefix_logits(model, batch, nodes, masks, values)
    return logits.ablated.flatten(0, 1), logits.clean


def _shares(model: CausalLM, nodes: Nodes, masks: Tensor) -> bool:
    """True if the circuits share the clean prefix."""
    mixes = masks.is_floating_point()
    return not (mixes or isinstance(model, FSDPModule)) and saved_share(nodes, masks) > 0


def _edge_circuits(
    model: CausalLM, batch: Batch, graph: Graph, masks: Tensor, values: Values, recompute: bool
) -> tuple[Tensor, None]:
    rows, mask = _repeated(batch, masks)
    return run_edges(model, rows, graph, mask, values, recompute), None


def _repeated(batch: Batch, masks: Tensor) -> tuple[Batch, Tensor]:
    """Every prompt under every mask: a row for each pair."""
    numbers = masks if masks.is_floating_point() else masks.float()
    return batch.repeat(len(masks)), numbers.to(batch.tokens.device).repeat_interleave(len(batch), dim=0)


def _node_row_bytes(model: CausalLM, batch: Batch, nodes: Nodes, masks: Tensor, gradients: bool) -> list[int]:
    """Estimated bytes of a row's activations in one block, or in all blocks that a backward pass needs, and logits."""
    sizes, width = nodes.dimensions, batch.tokens.shape[1]
    of_block = width * (10 * sizes.d_model + 4 * sizes.d_mlp + 2 * sizes.n_heads * width)
    vocabulary: int = model.config.vocab_size
    of_logits = 4 * batch.scored.shape[1] * vocabulary
    n_blocks = [1] * len(masks)
    if gradients:
        shares = _shares(model, nodes, masks)
        n_blocks = own_blocks(nodes, masks).tolist() if shares else [sizes.n_layers] * len(masks)
    return [(n * of_block + of_logits) * model.dtype.itemsize for n in n_blocks]


def _edge_row_bytes(model: CausalLM, batch: Batch, graph: Graph, masks: Tensor, gradients: bool) -> list[int]:
    return [edge_row_bytes(model, batch, gradients)] * len(masks)


ENGINES: dict[type[Level], Engine] = {
    Nodes: Engine(_run_nodes, _nodes_called, _node_circuits, _node_row_bytes),
    Graph: Engine(run_edges, edges_called, _edge_circuits, _edge_row_bytes),
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


def copies_logits(
    model: CausalLM,
    batch: Batch,
    level: Level,
    masks: Bool[Tensor, "circuit entry"] | Float[Tensor, "circuit entry"],
    values: Values,
    recompute: bool = False,
) -> Float[Tensor, "row scored vocabulary"]:
    """Like `masked_logits`, for S circuits on the same B prompts, laid out as `batch.repeat(S)`.

    Circuits of nodes share their clean prefix where that saves work and no mask mixes. False entries are ablated; if
    masks are numbers, which mix, gradients flow to them. There are values for all rows or for each of the S * B rows.
    """
    return ENGINES[type(level)].circuits(model, batch, level, masks, values, recompute)[0]


def copies_and_clean_logits(
    model: CausalLM,
    batch: Batch,
    level: Level,
    masks: Bool[Tensor, "circuit entry"] | Float[Tensor, "circuit entry"],
    values: Values,
    recompute: bool = False,
    clean: Float[Tensor, "batch scored vocabulary"] | None = None,
) -> tuple[Float[Tensor, "row scored vocabulary"], Float[Tensor, "batch scored vocabulary"]]:
    """`copies_logits`, and the clean model's logits without gradients.

    The clean logits are `clean` if it is given; otherwise they come from the same run if the circuits share their
    clean prefix, and from a run of their own if not.
    """
    logits, own = ENGINES[type(level)].circuits(model, batch, level, masks, values, recompute)
    clean = own if clean is None else clean
    if clean is None:
        with torch.no_grad():
            clean = scored_logits(model, batch)
    return logits, clean.detach()


def masked_call(
    model: CausalLM, level: Level, mask: Float[Tensor, "row entry"], values: Values, layout: TokenLayout
) -> AbstractContextManager[None]:
    """Mask one call of a model with tokens of this layout, inside the context; see `masked_logits`."""
    return ENGINES[type(level)].called(model, level, mask, values, layout)
