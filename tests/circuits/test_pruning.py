"""Removing dangling edges equals a search through the graph, edge by edge."""

import networkx as nx
import pytest
import torch

from oa_train.circuits.pruning import without_dangling
from oa_train.models.graph import Graph

GRAPHS = {
    "plain": Graph(3, 4, 4),
    "grouped": Graph(3, 4, 2),
    "one group": Graph(2, 3, 1),
    "parallel": Graph(3, 2, 2, parallel=True),
    "one layer": Graph(1, 2, 2),
}


def owners(graph: Graph, reader: str) -> list[str]:
    """The nodes that a reader leads to."""
    if "<" not in reader:
        return [reader]
    layer, part = reader.partition("<")[0].split(".")
    if part[0] == "h":
        return [f"{layer}.{part}"]
    size, group = graph.n_heads // graph.n_kv_heads, int(part[1:])
    return [f"{layer}.h{head}" for head in range(group * size, (group + 1) * size)]


def by_search(graph: Graph, kept: torch.Tensor) -> torch.Tensor:
    """Edges on some way from the input to the logits."""
    sources = [graph.sources[i] for i in graph.edge_sources.tolist()]
    readers = [owners(graph, graph.readers[i]) for i in graph.edge_readers.tolist()]
    found = nx.DiGraph()
    found.add_nodes_from([*graph.sources, "logits"])
    for edge in kept.nonzero().flatten().tolist():
        found.add_edges_from((sources[edge], owner) for owner in readers[edge])
    reached = nx.descendants(found, "input") | {"input"}
    leading = nx.ancestors(found, "logits") | {"logits"}
    on_the_way = [
        source in reached and bool(leading & set(into)) for source, into in zip(sources, readers, strict=True)
    ]
    return kept & torch.tensor(on_the_way)


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_left_is_what_a_search_finds(name, density):
    graph = GRAPHS[name]
    kept = torch.rand(40, graph.n_edges, generator=torch.Generator().manual_seed(0)) < density
    given = kept.clone()
    pruned = without_dangling(graph, kept)
    for before, after in zip(kept, pruned, strict=True):
        assert torch.equal(after, by_search(graph, before))
    assert torch.equal(kept, given)
    assert torch.equal(without_dangling(graph, pruned), pruned)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_whole_graph_has_nothing_that_dangles_and_an_empty_one_nothing(name):
    graph = GRAPHS[name]
    for mask in (torch.ones(1, graph.n_edges).bool(), torch.zeros(1, graph.n_edges).bool()):
        assert torch.equal(without_dangling(graph, mask), mask)


def test_rows_do_not_touch_each_other():
    graph = GRAPHS["plain"]
    kept = torch.rand(8, graph.n_edges, generator=torch.Generator().manual_seed(1)) < 0.1
    together = without_dangling(graph, kept)
    assert torch.equal(together, torch.cat([without_dangling(graph, row.unsqueeze(0)) for row in kept]))
    assert together.sum() < kept.sum()
