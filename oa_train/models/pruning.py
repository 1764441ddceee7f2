"""Dangling edges: only edges on a path from the input to the logits count.

An edge into a source that nobody reads changes nothing. A source that reads nothing of the prompt tells nothing of it:
under constants it is a constant itself, though another one than its replacement, so that constants are to be refitted
after its edges are gone.
"""

from bisect import bisect_right

import torch

from oa_train.models.edge_layout import EdgeLayout
from oa_train.shapes import Bool, Float, Tensor


def without_dangling(graph: EdgeLayout, kept: Bool[Tensor, "row entry"]) -> Bool[Tensor, "row entry"]:
    """Remove every edge that lies on no path from the input to the logits, in each row by itself.

    A head is one node: whatever its query, key or value reads gets into it. A key or value that several heads share
    leads to all of them.

    Args:
        graph: whose edges they are.
        kept: edges of each circuit.

    Returns:
        A new mask.
    """
    stages = _stages(graph)
    read = [part.unflatten(1, (stage.n_readers, -1)) for part, stage in zip(_split(kept, stages), stages, strict=True)]
    read = _that_lead_on(graph, read, stages)
    read = _that_come_from_the_input(graph, read, stages)
    return torch.cat([part.flatten(1) for part in read], dim=1)


class _Stage:
    """Readers that read at one time: all of a layer's attention, an MLP, or the logits.

    Args:
        graph: that they are of.
        layer: of the block; the number of layers for the logits.
        attention: whether they are attention's.
    """

    def __init__(self, graph: EdgeLayout, layer: int, attention: bool) -> None:
        before = 1 + layer * (graph.n_heads + 1)
        self._graph = graph
        self.attention = attention
        self.n_readers = graph.n_heads + 2 * graph.n_kv_heads if attention else 1
        reads_heads = not attention and layer < graph.n_layers and not graph.parallel
        self.n_read = before + (graph.n_heads if reads_heads else 0)
        # The sources that these readers belong to; none for the logits.
        mlp = before + graph.n_heads
        self.own = slice(before, mlp) if attention else slice(mlp, min(mlp + 1, graph.n_sources))

    def readers_of(self, sources: Bool[Tensor, "row source"]) -> Bool[Tensor, "row reader"]:
        """Which readers belong to one at least of the sources that are marked."""
        if not self.attention:
            return sources
        by_group = sources.unflatten(1, (self._graph.n_kv_heads, -1)).any(dim=2)
        return torch.cat([sources, by_group, by_group], dim=1)

    def sources_of(self, readers: Bool[Tensor, "row reader"]) -> Bool[Tensor, "row source"]:
        """Which sources have one at least of the readers that are marked."""
        if not self.attention:
            return readers
        n_heads, n_groups = self._graph.n_heads, self._graph.n_kv_heads
        queries, keys, values = readers.split([n_heads, n_groups, n_groups], dim=1)
        alive: Tensor = queries | (keys | values).repeat_interleave(n_heads // n_groups, dim=1)
        return alive


def _stages(graph: EdgeLayout) -> list[_Stage]:
    layers = range(graph.n_layers)
    stages = [_Stage(graph, layer, attention) for layer in layers for attention in (True, False)]
    return [*stages, _Stage(graph, graph.n_layers, False)]


def _split(kept: Tensor, stages: list[_Stage]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = kept.split([stage.n_readers * stage.n_read for stage in stages], dim=1)
    return parts


def _that_lead_on(graph: EdgeLayout, read: list[Tensor], stages: list[_Stage]) -> list[Tensor]:
    """Of the edges [row, reader, source] of every stage those from whose reader the logits can be reached."""
    is_read = torch.zeros(len(read[0]), graph.n_sources, dtype=torch.bool, device=read[0].device)
    found = []
    for part, stage in zip(reversed(read), reversed(stages), strict=True):
        logits = stage.own.start >= graph.n_sources
        leading = part if logits else part & stage.readers_of(is_read[:, stage.own]).unsqueeze(2)
        is_read[:, : stage.n_read] |= leading.any(dim=1)
        found.append(leading)
    return found[::-1]


def _that_come_from_the_input(graph: EdgeLayout, read: list[Tensor], stages: list[_Stage]) -> list[Tensor]:
    """Of these edges those whose source can be reached from the input."""
    reaches = torch.zeros(len(read[0]), graph.n_sources, dtype=torch.bool, device=read[0].device)
    reaches[:, 0] = True
    found = []
    for part, stage in zip(read, stages, strict=True):
        coming = part & reaches[:, : stage.n_read].unsqueeze(1)
        if stage.own.start < graph.n_sources:
            reaches[:, stage.own] = stage.sources_of(coming.any(dim=2))
        found.append(coming)
    return found


def within_budget(graph: EdgeLayout, scores: Float[Tensor, " edge"], budget: int) -> Bool[Tensor, " edge"]:
    """The circuit of a given size that the highest scores make, none of whose edges dangles.

    Edges are taken in the order of their scores for as long as those among them that lie on a path from the input to
    the logits are no more than the budget. What is then left of it goes to the highest edges between nodes that are
    there already.

    Args:
        graph: whose edges they are.
        scores: of all edges.
        budget: edges of the circuit. It may have fewer, where all edges between its nodes are in it already and a
            further node would bring more than is left.
    """
    order = _descending(scores)

    def circuit(taken: int) -> Tensor:
        mask = torch.zeros(1, len(scores), dtype=torch.bool)
        mask[0, order[:taken]] = True
        return without_dangling(graph, mask)[0]

    # The more edges are taken the more remain, so the place where they become too many is found by halving.
    most = bisect_right(range(len(scores) + 1), budget, key=lambda taken: int(circuit(taken).sum())) - 1
    chosen = circuit(most)
    while (joining := _joins(graph, chosen)).any() and (left := budget - int(chosen.sum())):
        chosen[order[joining[order]][:left]] = True
    return chosen


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)


def _joins(graph: EdgeLayout, circuit: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
    """Edges outside of a circuit without dangling ones that lead from where it gets to what it reads."""
    stages = _stages(graph)[:-1]
    leads_on = torch.zeros(1, graph.n_sources, dtype=torch.bool)
    leads_on[0, graph.edge_sources[circuit]] = True
    read = torch.cat([stage.readers_of(leads_on[:, stage.own]) for stage in stages], dim=1)
    entered = torch.zeros(1, graph.n_readers, dtype=torch.bool)
    entered[0, graph.edge_readers[circuit]] = True
    parts = entered[:, :-1].split([stage.n_readers for stage in stages], dim=1)
    reached = torch.cat([stage.sources_of(part) for stage, part in zip(stages, parts, strict=True)], dim=1)
    always = torch.ones(1, 1, dtype=torch.bool)  # the input is there, and the logits are read
    reached, read = torch.cat([always, reached], dim=1)[0], torch.cat([read, always], dim=1)[0]
    return reached[graph.edge_sources] & read[graph.edge_readers] & ~circuit
