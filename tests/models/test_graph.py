"""Sources, readers and edges, against an enumeration of what is written before what is read."""

import pytest
import torch
from transformers import AutoConfig

from oa_train.errors import ModelError
from oa_train.models.components import Components
from oa_train.models.graph import Graph

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
    assert graph.sources == ("input", *Components(2, 4).names)
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
    with pytest.raises(ModelError, match="'bloom'"):
        Graph.of(AutoConfig.for_model("bloom"))
