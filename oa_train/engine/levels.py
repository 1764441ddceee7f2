"""Running a model under masks over its components or over its edges; how many entries a mask has tells which."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from oa_train.ablations.base import SourceValues
from oa_train.batches import Batch
from oa_train.engine.edges.run import edge_logits, mixed_edges
from oa_train.engine.nodes import node_logits, node_taps, spread_mask
from oa_train.models.selection import Components
from oa_train.models.families import Dimensions
from oa_train.models.graph import Graph
from oa_train.models.loading import CausalLM
from oa_train.models.taps import tapped
from oa_train.shapes import Bool, Float, Tensor

# Of what edges are mixed from, in one run that may as well be several: evaluations, and the training of constants.
RUN_BYTES = 2**29


def masked_logits(
    model: CausalLM,
    batch: Batch,
    mask: Float[Tensor, "row entry"],
    replacements: SourceValues,
    bos_token_id: int | None,
    recompute: bool = False,
) -> Float[Tensor, "row scored vocabulary"]:
    """Logits at the scored positions under masks of either kind; see `node_logits` and `edge_logits`.

    Raises:
        ValueError: the model has neither as many components nor as many edges.
    """
    run = edge_logits if over_edges(model, mask.shape[1]) else node_logits
    return run(model, batch, mask, replacements, bos_token_id, recompute)


@contextmanager
def masked_call(
    model: CausalLM,
    mask: Float[Tensor, "row entry"],
    replacements: SourceValues,
    kept: Bool[Tensor, "row position"],
) -> Iterator[None]:
    """Mask one call of a model, inside the context.

    Args:
        model: that is called with as many rows and positions as `kept` has.
        mask: over components or edges.
        replacements: what stands in.
        kept: tokens at which nothing is ablated.
    """
    if over_edges(model, mask.shape[1]):
        with mixed_edges(model, mask, replacements, kept):
            yield
    else:
        with tapped(node_taps(model, spread_mask(mask, kept), replacements)):
            yield


def rows_within_memory(model: CausalLM, batch: Batch, n_entries: int, gradients: bool = False) -> int:
    """How many rows of one run take no more than `RUN_BYTES` for what is written to and read from the residual stream.

    Masks over components leave these to the model, and so to whoever chooses the rows of a run.

    Args:
        model: that runs.
        batch: prompts as wide as those of the run.
        n_entries: of the masks.
        gradients: whether a backward pass follows, for which all is kept and has a gradient.
    """
    if not over_edges(model, n_entries):
        return sys.maxsize
    graph = Graph.of(model.config)
    in_layer = graph.n_heads + 2 * graph.n_kv_heads + 1
    streams = 2 * graph.n_sources + graph.n_readers if gradients else graph.n_sources + in_layer
    each = batch.tokens.shape[1] * Dimensions.of(model.config).d_model * model.dtype.itemsize
    return max(1, RUN_BYTES // (streams * each))


def replaced_sources(model: CausalLM, masks: Bool[Tensor, "circuit entry"]) -> Bool[Tensor, "circuit source"]:
    """Which sources a circuit ever replaces: those that are ablated, or one of whose edges is cut."""
    if not over_edges(model, masks.shape[1]):
        return torch.nn.functional.pad(~masks, (1, 0))  # the embedding is no component
    graph = Graph.of(model.config)
    replaced = torch.zeros(len(masks), graph.n_sources, dtype=torch.int, device=masks.device)
    return replaced.index_add_(1, graph.edge_sources.to(masks.device), (~masks).int()) > 0


def over_edges(model: CausalLM, n_entries: int) -> bool:
    """Whether a mask of so many entries is over edges; else it is over components, which are fewer.

    Raises:
        ValueError: the model has neither as many components nor as many edges.
    """
    n_components, n_edges = len(Components.of(Dimensions.of(model.config))), len(Graph.of(model.config))
    if n_entries not in (n_components, n_edges):
        raise ValueError(
            f"The mask has {n_entries} entries; this model has {n_components} components and {n_edges} edges."
        )
    return n_entries == n_edges
