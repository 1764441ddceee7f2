"""Removal of dangling edges: those that lie on no path of kept edges from the input to the logits.

An edge into a component that no reader reads changes nothing. A component that reads nothing of the prompt carries no
information about it: under constants its output is itself constant, but not equal to its replacement, so constants
should be refitted after its edges are removed.
"""

from bisect import bisect_right

import torch

from oa_train.models.edge_layout import EdgeLayout
from oa_train.shapes import Bool, Float, Tensor


def without_dangling(graph: EdgeLayout, kept: Bool[Tensor, "row entry"]) -> Bool[Tensor, "row entry"]:
    """A new mask without dangling edges, separately in each row.

    A head is one node: a path enters it through its query, key or value. A key or value that several heads share leads
    to all of them.
    """
    stages = _stages(graph)
    parts = kept.split([stage.n_readers * stage.n_read for stage in stages], dim=1)
    read = [part.unflatten(1, (stage.n_readers, -1)) for part, stage in zip(parts, stages, strict=True)]
    read = _from_the_input(graph, _to_the_logits(read, stages), stages)
    return torch.cat([part.flatten(1) for part in read], dim=1)


class _Stage:
    """Readers that read at the same time: a layer's queries, keys and values, its MLP, or at the end the logits."""

    def __init__(self, graph: EdgeLayout, layer: int, attention: bool) -> None:
        before, self._graph, self._attention = graph.sources_before(layer), graph, attention
        mlp = before + graph.n_heads
        self.n_readers = graph.n_attention_readers if attention else 1
        self.n_read = before if attention or layer == graph.n_layers or graph.parallel else mlp
        # The sources to which these readers belong; the logits belong to none.
        self.own = slice(before, mlp) if attention else slice(mlp, mlp + 1)

    def readers_of(self, sources: Bool[Tensor, "row source"]) -> Bool[Tensor, "row reader"]:
        """Readers that belong to at least one of the marked sources."""
        if not self._attention:
            return sources
        by_group = sources.unflatten(1, (self._graph.n_kv_heads, -1)).any(dim=2)
        return torch.cat([sources, by_group, by_group], dim=1)

    def sources_of(self, readers: Bool[Tensor, "row reader"]) -> Bool[Tensor, "row source"]:
        """Sources that at least one of the marked readers belongs to."""
        if not self._attention:
            return readers
        n_heads, n_groups = self._graph.n_heads, self._graph.n_kv_heads
        queries, keys, values = readers.split([n_heads, n_groups, n_groups], dim=1)
        alive: Tensor = queries | (keys | values).repeat_interleave(n_heads // n_groups, dim=1)
        return alive


def _stages(graph: EdgeLayout) -> list[_Stage]:
    stages = [_Stage(graph, layer, attention) for layer in range(graph.n_layers) for attention in (True, False)]
    return [*stages, _Stage(graph, graph.n_layers, False)]


def _to_the_logits(read: list[Tensor], stages: list[_Stage]) -> list[Tensor]:
    """Edges [row, reader, source] of every stage whose reader is on a path to the logits."""
    leading, is_read = [read[-1]], read[-1].any(dim=1)
    for part, stage in zip(read[-2::-1], stages[-2::-1], strict=True):
        leading.append(part & stage.readers_of(is_read[:, stage.own]).unsqueeze(2))
        is_read[:, : stage.n_read] |= leading[-1].any(dim=1)
    return leading[::-1]


def _from_the_input(graph: EdgeLayout, read: list[Tensor], stages: list[_Stage]) -> list[Tensor]:
    """Edges whose source is reachable from the input."""
    reached = torch.zeros(len(read[0]), graph.n_sources, dtype=torch.bool, device=read[0].device)
    reached[:, 0] = True
    coming = []
    for part, stage in zip(read, stages, strict=True):
        coming.append(part & reached[:, : stage.n_read].unsqueeze(1))
        if stage is not stages[-1]:
            reached[:, stage.own] = stage.sources_of(coming[-1].any(dim=2))
    return coming


def within_budget(graph: EdgeLayout, scores: Float[Tensor, " edge"], budget: int) -> Bool[Tensor, " edge"]:
    """The circuit of at most `budget` edges with the highest scores and no dangling edges.

    Edges are taken in the order of their scores as long as those that do not dangle fit the budget. The rest of the
    budget goes to the edges with the highest scores between nodes that are already in the circuit. The circuit is
    smaller than the budget if it has all edges between its nodes and another node would add more edges than are left.
    """
    order = scores.argsort(descending=True, stable=True)

    def circuit(taken: int) -> Tensor:
        mask = torch.zeros(1, len(scores), dtype=torch.bool)
        mask[0, order[:taken]] = True
        return without_dangling(graph, mask)[0]

    # The circuit grows monotonically with the edges taken, so bisection finds where it becomes too large.
    most = bisect_right(range(len(scores) + 1), budget, key=lambda taken: int(circuit(taken).sum())) - 1
    chosen = circuit(most)
    while (joining := _joins(graph, chosen)).any() and (left := budget - int(chosen.sum())):
        chosen[order[joining[order]][:left]] = True
    return chosen


def _joins(graph: EdgeLayout, circuit: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
    """Edges outside a circuit, which has no dangling edges, from a source that it reaches to a reader that it uses."""
    stages = _stages(graph)[:-1]
    leads_on = torch.zeros(1, graph.n_sources, dtype=torch.bool)
    leads_on[0, graph.edge_sources[circuit]] = True
    entered = torch.zeros(1, graph.n_readers, dtype=torch.bool)
    entered[0, graph.edge_readers[circuit]] = True
    parts = entered[:, :-1].split([stage.n_readers for stage in stages], dim=1)
    always = torch.ones(1, 1, dtype=torch.bool)  # the input always writes, and the logits are always used
    reached = torch.cat([always, *(stage.sources_of(part) for stage, part in zip(stages, parts, strict=True))], dim=1)
    used = torch.cat([*(stage.readers_of(leads_on[:, stage.own]) for stage in stages), always], dim=1)
    return reached[0, graph.edge_sources] & used[0, graph.edge_readers] & ~circuit
