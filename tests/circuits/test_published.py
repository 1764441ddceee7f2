"""The published circuit is the one that its rules describe, edge by edge."""

import re

import pytest
import torch

from oa_train.circuits import published
from oa_train.circuits.circuit import Circuit
from oa_train.circuits.published import GPT2_SMALL, published_ioi_circuit
from oa_train.errors import ConfigurationError
from oa_train.models.graph import Graph


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return published_ioi_circuit(Graph(*GPT2_SMALL))


def edges(circuit: Circuit, source: str, reader: str) -> set[str]:
    """Edges whose source and reader match regular expressions."""
    return {name for name in circuit.names if re.fullmatch(f"{source}->{reader}", name)}


def later(sources: tuple[str, ...], readers: tuple[str, ...], kinds: str) -> set[str]:
    """Edges between heads, where the reader is in a later layer."""
    layer = {head: int(head[1:].split(".")[0]) for head in (*sources, *readers)}
    pairs = [(source, reader) for source in sources for reader in readers if layer[source] < layer[reader]]
    return {f"{source}->{reader}<{kind}>" for source, reader in pairs for kind in kinds}


def test_it_has_963_edges_of_38_components_and_none_dangles(circuit):
    assert (len(circuit), len(circuit.level)) == (963, 32_491)
    assert torch.equal(circuit.level.prune(circuit.mask.unsqueeze(0))[0], circuit.mask)
    assert set(circuit.nodes) == {*published.ALL_HEADS, *(f"m{layer}" for layer in range(12))}
    assert len(set(published.ALL_HEADS)) == len(published.ALL_HEADS) == 26


def test_all_edges_between_input_mlps_and_logits_are_there(circuit):
    found = edges(circuit, "(input|m.*)", "(logits|m.*)")
    assert len(found) == 91
    assert {"input->logits", "input->m0", "m0->m11", "m11->logits"} <= found


def test_heads_and_mlps_read_each_other(circuit):
    layers = [int(head[1:].split(".")[0]) for head in published.ALL_HEADS]
    assert len(edges(circuit, r"a.*", r"m.*")) == sum(12 - layer for layer in layers)
    assert edges(circuit, r"a9\.h9", r"m.*") == {"a9.h9->m9", "a9.h9->m10", "a9.h9->m11"}
    assert len(edges(circuit, r"m.*", r"a.*")) == 3 * sum(layers)
    assert edges(circuit, r"m.*", r"a2\.h2<.>") == {f"m{layer}->a2.h2<{kind}>" for layer in (0, 1) for kind in "qkv"}


def test_what_reads_the_input(circuit):
    queries = (*published.S_INHIBITION, *published.DUPLICATE_TOKEN, *published.PREVIOUS_TOKEN)
    assert edges(circuit, "input", ".*<q>") == {f"input->{head}<q>" for head in queries}
    others = (*published.MOVERS, *published.PREVIOUS_TOKEN, *published.DUPLICATE_TOKEN)
    assert edges(circuit, "input", ".*<[kv]>") == {f"input->{head}<{kind}>" for head in others for kind in "kv"}


def test_what_the_heads_read_of_each_other(circuit):
    movers, inhibition = published.MOVERS, published.S_INHIBITION
    assert edges(circuit, r"a.*", "logits") == {f"{head}->logits" for head in movers}
    wanted = later(inhibition, movers, "q")
    wanted |= later((*published.DUPLICATE_TOKEN, *published.INDUCTION), inhibition, "kv")
    wanted |= later(published.PREVIOUS_TOKEN, published.INDUCTION, "kv")
    assert edges(circuit, r"a.*", r"a.*") == wanted
    assert {
        "a7.h3->a9.h9<q>",
        "a8.h10->a11.h10<q>",
        "a3.h0->a7.h9<v>",
        "a6.h9->a8.h6<k>",
        "a4.h11->a5.h5<k>",
    } <= wanted
    assert len(movers) == 13


@pytest.mark.parametrize("graph", [Graph(3, 4, 4), Graph(12, 12, 4), Graph(12, 12, 12, parallel=True)])
def test_another_model_has_no_such_circuit(graph):
    with pytest.raises(ConfigurationError, match="is for GPT-2 small: 12 layers of 12 heads"):
        published_ioi_circuit(graph)
