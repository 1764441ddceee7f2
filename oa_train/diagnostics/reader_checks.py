"""Checks that each query, key and value is read at the right place, for the self-check.

That keeping all edges reproduces the model says little about this: with equal inputs, readers that are mixed up give
the same outputs.
"""

from collections.abc import Sequence

import torch

from oa_train.batches import Batch
from oa_train.engine.levels import masked_logits
from oa_train.engine.reading import read_values
from oa_train.engine.values import Values
from oa_train.models.families import check_family
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.hooks import Tap, tapped
from oa_train.models.parts import find_parts
from oa_train.progress import Advance
from oa_train.shapes import Bool, Float, Tensor


@torch.no_grad()
def logits_with_every_edge(model: CausalLM, batch: Batch) -> Float[Tensor, "row scored vocabulary"]:
    """Logits of the engine for edges with every edge kept."""
    graph = Graph.of(model.config)
    everything = torch.ones(len(batch), len(graph), device=model.device)
    return masked_logits(model, batch, graph, everything, read_values(model, batch, graph))


@torch.no_grad()
def misplaced_readers(
    model: CausalLM, batch: Batch, tolerance: float, layers: Sequence[int], advance: Advance = lambda done: None
) -> int:
    """Count readers of attention that change outputs of heads that they must not change.

    Each reader in turn gets a different input at one position. For a query this may change only its own head, at that
    position; for a key or value, only the heads that share it, at that position and later ones. A value with the same
    input at every position makes the outputs of its heads the same at every position, whatever they attend to.

    Args:
        model: frozen causal language model.
        batch: a prompt without padding; its first token is left unchanged.
        tolerance: difference, relative to the largest value, that counts as none.
        layers: indices of the layers whose readers are checked.
        advance: called with the number of rows that were run.
    """
    graph, width = Graph.of(model.config), batch.tokens.shape[1]
    place, n_readers = width // 2, graph.n_heads + 2 * graph.n_kv_heads
    family = check_family(model.config.model_type)
    values, rows = read_values(model, batch, graph), batch.repeat(n_readers)
    before = torch.arange(width)
    before[place] = place - 1
    at_place = values.mapped(lambda tensor: tensor[:, before])
    everywhere = values.mapped(lambda tensor: tensor[:, torch.zeros_like(before)])
    may_move = _may_move(model, graph, place, width)
    wrong = 0
    for layer in layers:
        # In each layer, the MLP's reader follows those of attention.
        readers = layer * (n_readers + 1) + torch.arange(n_readers)
        mask = (graph.edge_readers != readers.unsqueeze(1)).float().to(model.device)
        clean = _heads(model, rows, torch.ones_like(mask), values, layer)
        smallest = tolerance * clean.abs().max()
        moved = ((_heads(model, rows, mask, at_place, layer) - clean).abs().amax(dim=-1) > smallest).cpu()
        constant = _heads(model, rows, mask, everywhere, layer)
        varies = ((constant - constant[:, :1]).abs().amax(dim=(1, 3)) > smallest).cpu()
        advance(3 * n_readers)
        varies &= may_move.any(dim=1)
        # With a norm after attention, the same replacement is scaled differently at each token.
        skipped = family.attention_sinks or (family.attention_post_norm and layer)
        varies[: None if skipped else -graph.n_kv_heads] = False
        wrong += int(((moved & ~may_move).flatten(1).any(dim=1) | varies.any(dim=1)).sum())
    return wrong


def _heads(
    model: CausalLM, batch: Batch, mask: Tensor, values: Values, layer: int
) -> Float[Tensor, "row position head d_head"]:
    """Outputs of a layer's heads while edges are cut."""
    parts, read = find_parts(model), list[Tensor]()
    with tapped([Tap(parts.attention_outputs[layer], "input", read.append)]):
        masked_logits(model, batch, Graph.of(model.config), mask, values.repeat(len(mask)))
    sizes = parts.dimensions
    return read[0].reshape(*batch.tokens.shape, sizes.n_heads, sizes.d_head)


def _may_move(model: CausalLM, graph: Graph, place: int, width: int) -> Bool[Tensor, "reader position head"]:
    """True where the output of a head may change when a reader of the layer gets another input at one position."""
    heads, positions = torch.arange(graph.n_heads), torch.arange(width).view(1, -1, 1)
    own = heads.unsqueeze(1) == heads
    shared = torch.arange(graph.n_kv_heads).unsqueeze(1) == heads // (graph.n_heads // graph.n_kv_heads)
    joint = check_family(model.config.model_type).joint_norms
    queries = (own | joint).unsqueeze(1) & (positions == place)
    keys, values = (of_heads.unsqueeze(1) & (positions >= place) for of_heads in (shared | joint, shared))
    return torch.cat([queries, keys, values])
