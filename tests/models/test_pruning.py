"""Removing dangling edges equals a search through the graph, edge by edge."""

import networkx as nx
import pytest
import torch

from oa_train.circuits.random import random_circuits
from oa_train.errors import ConfigurationError
from oa_train.models.graph import Graph
from oa_train.models.parts import Dimensions
from oa_train.models.pruning import within_budget, without_dangling
from oa_train.models.selection import Nodes

NODES = Nodes(Dimensions(3, 4, 8, 32, 48))
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
    kept = torch.rand(20, graph.n_edges, generator=torch.Generator().manual_seed(0)) < density
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


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("seed", range(2))
def test_a_budget_is_used_up_and_nothing_dangles(name, seed):
    graph = GRAPHS[name]
    scores = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(seed))
    for budget in (0, 1, 17, graph.n_edges // 2, graph.n_edges):
        circuit = within_budget(graph, scores, budget)
        assert torch.equal(circuit, by_search(graph, circuit))
        short = min(budget, graph.n_edges) - int(circuit.sum())
        # Short only where every further edge would be one too many, or would dangle.
        for edge in (~circuit).nonzero().flatten().tolist() if short else ():
            more = circuit.clone()
            more[edge] = True
            assert int(by_search(graph, more).sum()) - int(circuit.sum()) in (0, *range(short + 1, 99))
        assert 0 <= short < 10
        # The highest edges alone, as many as fit, are among them.
        rank = scores.argsort(descending=True).argsort()
        taken = max(n for n in range(graph.n_edges + 1) if by_search(graph, rank < n).sum() <= budget)
        assert not (by_search(graph, rank < taken) & ~circuit).any()


def test_of_equal_scores_the_first_are_taken():
    scores = torch.tensor([0.5, 0.7, 0.5, 0.7]).repeat(4)[: len(NODES)]
    assert NODES.kept(NODES.largest(scores, 8)) == tuple(NODES.names[n] for n in (0, 1, 3, 5, 7, 9, 11, 13))
    assert not NODES.largest(scores, 0).any()


def test_more_entries_than_there_are_cannot_be_taken():
    for level in (NODES, GRAPHS["grouped"]):
        with pytest.raises(ConfigurationError, match=f"A circuit of {len(level) + 1} parts was asked for"):
            level.largest(torch.zeros(len(level)), len(level) + 1)


def test_nodes_do_not_dangle():
    kept = torch.rand(4, len(NODES)) > 0.5
    assert torch.equal(NODES.prune(kept), kept)


@pytest.mark.parametrize("level", [NODES, *GRAPHS.values()], ids=["nodes", *GRAPHS])
def test_random_circuits_have_the_size_and_follow_the_seed(level):
    drawn = random_circuits(level, 9, 6, seed=3)
    assert [len(circuit) for circuit in drawn] == [9] * 6
    assert len({circuit.names for circuit in drawn}) > 1
    assert drawn == random_circuits(level, 9, 6, seed=3) != random_circuits(level, 9, 6, seed=4)
    for circuit in drawn:
        assert torch.equal(level.prune(circuit.mask.unsqueeze(0))[0], circuit.mask)


def test_edges_that_cannot_be_left_out_come_first():
    graph = GRAPHS["plain"]
    always = graph.mask(graph.select(["*->logits"]))
    for circuit in random_circuits(graph, 60, 5, seed=0, among=["*", "!*->logits"]):
        # All but those whose source reads nothing in this circuit.
        read = {name.split("->")[1].split("<")[0] for name in circuit.names}
        for name in graph.kept(always & ~circuit.mask):
            assert name.split("->")[0] not in read
    # Of those that are always kept some may lead nowhere.
    assert [len(circuit) for circuit in random_circuits(graph, 3, 2, seed=0, among=["*", "!*->logits"])] == [3, 3]
    with pytest.raises(ConfigurationError, match="A circuit of 3 of"):
        random_circuits(NODES, 3, 1, seed=0, among=["a0*"])
