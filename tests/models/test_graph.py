"""Sources, readers and edges, against an enumeration of what is written before what is read."""

import json

import pytest
import torch
from transformers import AutoConfig

from oa_train.errors import ConfigurationError, ModelError, UnknownNameError
from oa_train.models.graph import Graph
from oa_train.models.parts import Dimensions
from oa_train.models.selection import Nodes

NEOX = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8}
GROUPED = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
SMALL = [
    # Family, configuration, key-value heads, parallel.
    ("gpt2", {"n_layer": 3, "n_head": 2, "n_embd": 8}, 2, False),
    ("gpt_neox", NEOX | {"use_parallel_residual": True}, 2, True),
    ("gpt_neox", NEOX | {"use_parallel_residual": False}, 2, False),
    ("gptj", {"n_layer": 3, "n_head": 2, "n_embd": 8, "rotary_dim": 2}, 2, True),
    ("phi", GROUPED, 2, True),
    ("llama", GROUPED, 2, False),
    ("qwen2", GROUPED | {"num_key_value_heads": 1}, 1, False),
    ("mistral", GROUPED | {"num_key_value_heads": 4}, 4, False),
]


def enumerate_edges(n_layers: int, n_heads: int, n_groups: int, parallel: bool) -> list[tuple[str, str]]:
    """Go through a forward pass and note at every reader what has been written so far."""
    letter = "h" if n_groups == n_heads else "k"
    written, edges = ["input"], []
    for layer in range(n_layers):
        readers = [f"a{layer}.h{head}<q>" for head in range(n_heads)]
        readers += [f"a{layer}.{letter}{group}<{kind}>" for kind in "kv" for group in range(n_groups)]
        heads = [f"a{layer}.h{head}" for head in range(n_heads)]
        edges += [(source, reader) for reader in readers for source in written]
        edges += [(source, f"m{layer}") for source in (written if parallel else written + heads)]
        written += [*heads, f"m{layer}"]
    return edges + [(source, "logits") for source in written]


@pytest.mark.parametrize(
    ("n_layer", "n_head", "edges"), [(12, 12, 32_491), (24, 16, 231_877), (36, 20, 810_703), (48, 25, 2_235_025)]
)
def test_gpt2_has_as_many_edges_as_it_should(n_layer, n_head, edges):
    config = AutoConfig.for_model("gpt2", n_layer=n_layer, n_head=n_head, n_embd=64 * n_head)
    graph = Graph.of(config)
    assert graph.n_edges == len(graph.edge_sources) == len(graph.edge_readers) == edges


@pytest.mark.parametrize(("family", "options", "n_groups", "parallel"), SMALL)
def test_edges_are_those_of_an_enumeration(family, options, n_groups, parallel):
    graph = Graph.of(AutoConfig.for_model(family, **options))
    assert (graph.n_kv_heads, graph.parallel) == (n_groups, parallel)
    pairs = zip(graph.edge_sources.tolist(), graph.edge_readers.tolist(), strict=True)
    named = [(graph.sources[source], graph.readers[reader]) for source, reader in pairs]
    assert named == enumerate_edges(graph.n_layers, graph.n_heads, n_groups, parallel)
    assert graph.n_edges == len(named)


def test_names_and_numbers_of_sources_and_readers_agree():
    graph = Graph(n_layers=2, n_heads=4, n_kv_heads=2)
    assert graph.sources == ("input", *Nodes(Dimensions(2, 4, 8, 32, 48)).names)
    assert len(graph.sources) == graph.n_sources == 11
    assert len(set(graph.readers)) == len(graph.readers) == graph.n_readers == len(graph.n_read) == 19
    assert graph.readers[:4] == ("a0.h0<q>", "a0.h1<q>", "a0.h2<q>", "a0.h3<q>")
    assert graph.readers[4:9] == ("a0.k0<k>", "a0.k1<k>", "a0.k0<v>", "a0.k1<v>", "m0")
    assert Graph(1, 2, 2).readers == (
        "a0.h0<q>",
        "a0.h1<q>",
        "a0.h0<k>",
        "a0.h1<k>",
        "a0.h0<v>",
        "a0.h1<v>",
        "m0",
        "logits",
    )
    assert torch.equal(graph.n_read, torch.tensor([1] * 8 + [5] + [6] * 8 + [10] + [11]))


def test_a_configuration_of_another_family_is_refused():
    with pytest.raises(ModelError, match="'gpt_bigcode'"):
        Graph.of(AutoConfig.for_model("gpt_bigcode"))


def test_names_of_edges_and_masks_say_the_same():
    graph = Graph(n_layers=2, n_heads=4, n_kv_heads=2)
    assert len(graph) == len(graph.names) == graph.n_edges
    assert [graph.index(name) for name in graph.names] == list(range(len(graph)))
    names = ("a1.h3->logits", "input->a0.k1<v>", "a0.h0->m0")
    assert graph.kept(graph.mask(names)) == ("input->a0.k1<v>", "a0.h0->m0", "a1.h3->logits")
    assert graph.nodes(graph.mask(names)) == ("a0.h0", "a1.h3")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a0.h9->logits", "no source named 'a0.h9'. Did you mean"),
        ("a0.h1->a1.h1<k>", "no reader named 'a1.h1<k>'. Did you mean .*a1.h1<q>"),
        ("a1.h1->a0.h1<q>", "no edge named 'a1.h1->a0.h1<q>'"),
        ("m0->m0", "no edge named"),
        ("a0.h1", "no edge named 'a0.h1'; an edge is named source->reader"),
    ],
)
def test_an_edge_that_is_none_is_refused(name, said):
    with pytest.raises(UnknownNameError, match=said):
        Graph(n_layers=2, n_heads=4, n_kv_heads=2).index(name)


def test_patterns_of_edges():
    graph = Graph(n_layers=2, n_heads=2, n_kv_heads=2)
    assert graph.select(["*->logits", "!m*"]) == tuple(
        f"{source}->logits" for source in ("input", "a0.h0", "a0.h1", "a1.h0", "a1.h1")
    )
    assert graph.select(["m0"]) == tuple(name for name in graph.names if name.startswith("m0->"))
    assert graph.select(["input->a0.*<q>"]) == ("input->a0.h0<q>", "input->a0.h1<q>")
    assert set(graph.select(["a0->m*"])) == {f"a0.h{head}->m{layer}" for head in (0, 1) for layer in (0, 1)}
    assert graph.select(["*"]) == graph.names
    for pattern in ("b*", "m1->m0", "*->a2*"):
        with pytest.raises(ConfigurationError, match="matches no edge"):
            graph.select([pattern])


@pytest.mark.parametrize(("n_kv_heads", "parallel"), [(4, False), (2, False), (1, True)])
def test_edges_at_heads_are_those_whose_names_say_so(n_kv_heads, parallel):
    graph = Graph(2, 4, n_kv_heads, parallel)
    by_name = []
    for number, name in enumerate(graph.names):
        source, reader = name.split("->")
        if source.startswith("a"):
            by_name.append((number, source))
        if "<" in reader:
            layer, part = reader[:-3].split(".")
            size = 1 if part[0] == "h" else 4 // n_kv_heads
            by_name += [(number, f"{layer}.h{int(part[1:]) * size + i}") for i in range(size)]
    heads = [name for name in graph.sources if name.startswith("a")]
    edges, numbers, _ = graph.entries_at_nodes()
    found = [(edge, heads[head]) for edge, head in zip(edges.tolist(), numbers.tolist(), strict=True)]
    assert sorted(found) == sorted(by_name)


def test_edges_between_nodes_name_the_heads_that_share_a_key():
    graph = Graph(2, 4, 2)
    names = ("input->a0.h0<q>", "input->a0.k0<k>", "input->a0.k1<v>", "a0.h0->m0", "a0.h1->logits", "m0->logits")
    assert graph.arrows(graph.mask(names)) == [
        ("input", "a0.h0", "q"),
        ("input", "a0.h0", "k"),
        ("input", "a0.h1", "k"),
        ("a0.h0", "m0", ""),
        ("a0.h1", "logits", ""),
        ("m0", "logits", ""),
    ]


def test_a_graph_is_a_level():
    graph = Graph.of(AutoConfig.for_model("llama", **GROUPED))
    assert (graph.kind, graph.part, graph.parts, graph.has_one_stream) == ("edges", "edge", "edges", False)
    assert graph.from_header(json.loads(json.dumps(graph.header()))) is graph
    assert graph.node_level(AutoConfig.for_model("llama", **GROUPED)).names == graph.sources[1:]
    assert list(graph.sites.values()) == [(1, 32)] + [(4, 8), (1, 32)] * 3
    kinds, of_entries = graph.entry_kinds
    wanted = {"i": "embedding", "a": "heads", "m": "mlp"}
    assert [kinds[number] for number in of_entries.tolist()] == [wanted[name[0]] for name in graph.names]


def test_sources_that_lose_an_edge_are_replaced():
    graph = Graph(2, 2, 2)
    masks = torch.ones(2, len(graph), dtype=torch.bool)
    masks[0, [graph.index("input->a0.h1<k>"), graph.index("a0.h1->m1")]] = False
    masks[1, graph.index("m0->logits")] = False
    replaced = graph.replaced(masks)
    named = [
        {name for name, used in zip(graph.sources, row.tolist(), strict=True) if used}
        for row in torch.cat([units[:, 0] for units in replaced.values()], dim=1)
    ]
    assert named == [{"input", "a0.h1"}, {"m0"}]


def test_edges_have_no_spans():
    with pytest.raises(ConfigurationError, match=r"'m\*@S2' names a span\. Spans are for circuits of nodes"):
        Graph(2, 2, 2).select(["m*@S2"])


def test_the_map_of_scores_has_a_row_for_each_reader_and_a_column_for_each_source():
    graph = Graph(2, 2, 1)
    drawn = graph.score_map(torch.arange(len(graph)).float())
    assert (drawn.rows, drawn.columns) == (graph.readers, graph.sources)
    for row, reader in enumerate(drawn.rows):
        for column, source in enumerate(drawn.columns):
            value = float(drawn.table[row, column])
            assert value != value if column >= graph.n_read[row] else value == graph.index(f"{source}->{reader}")
