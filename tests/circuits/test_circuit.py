"""Circuits: names in mask order, files that give them back, overlap, and random ones."""

from collections import Counter

import pytest
import torch
from scipy import stats

from oa_train.artefacts import Artefact, save_artefact
from oa_train.circuits.circuit import Circuit, jaccard
from oa_train.circuits.random import random_circuits
from oa_train.errors import ArtefactError, ConfigurationError, OaTrainError, UnknownNameError
from oa_train.models.graph import Graph
from oa_train.models.parts import Dimensions
from oa_train.models.selection import Nodes


def nodes(n_layers: int, n_heads: int) -> Nodes:
    return Nodes(Dimensions(n_layers, n_heads, d_head=4, d_model=16, d_mlp=64))


COMPONENTS = nodes(2, 3)


def test_nodes_stand_in_mask_order():
    circuit = Circuit(COMPONENTS, ("m1", "a1.h0", "a0.h2", "m1"))
    assert circuit.nodes == ("a0.h2", "a1.h0", "m1")
    assert circuit.mask.tolist() == [False, False, True, False, True, False, False, True]
    assert len(circuit) == 3
    assert circuit.counts() == {"nodes": 3, "nodes_total": 8}


def test_the_empty_and_the_whole_circuit():
    assert Circuit(COMPONENTS, ()).mask.tolist() == [False] * 8
    assert Circuit(COMPONENTS, COMPONENTS.names).mask.all()


def test_mask_and_names_say_the_same():
    for seed in range(5):
        mask = torch.rand(8, generator=torch.Generator().manual_seed(seed)) > 0.5
        circuit = Circuit.from_mask(COMPONENTS, mask)
        assert torch.equal(circuit.mask, mask)
        assert circuit == Circuit(COMPONENTS, circuit.nodes)


def test_circuits_are_equal_by_their_components_alone():
    first = Circuit(COMPONENTS, ("m0", "a0.h0"), torch.rand(8), {"model": "x"})
    assert first == Circuit(COMPONENTS, ("a0.h0", "m0"))
    assert hash(first) == hash(Circuit(COMPONENTS, ("a0.h0", "m0")))
    assert first != Circuit(COMPONENTS, ("m0",))
    assert first != Circuit(nodes(2, 4), ("m0", "a0.h0"))


def test_patterns():
    assert Circuit.from_patterns(COMPONENTS, ["m*", "a1"]).nodes == ("m0", "a1.h0", "a1.h1", "a1.h2", "m1")
    assert Circuit.from_patterns(COMPONENTS, ["*", "!a*"]).nodes == ("m0", "m1")
    with pytest.raises(ConfigurationError, match="'a7' matches no component"):
        Circuit.from_patterns(COMPONENTS, ["a7"])


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"no component named 'a1\.h5'\. Did you mean .*a1\.h"):
        Circuit(COMPONENTS, ("m0", "a1.h5"))


@pytest.mark.parametrize("scores", [None, torch.linspace(0, 1, 8), torch.linspace(0, 1, 8).double() / 3])
@pytest.mark.parametrize("names", [(), ("a0.h2", "m1")])
def test_a_saved_circuit_is_loaded(tmp_path, scores, names):
    provenance = {"model": "tiny", "fingerprint": "0a", "task": {"seed": 1}}
    circuit = Circuit(COMPONENTS, names, scores, provenance)
    loaded = Circuit.load(circuit.save(tmp_path / "circuit"))
    assert loaded == circuit
    assert loaded.names == names
    assert loaded.level == COMPONENTS
    assert loaded.provenance == provenance
    if scores is None:
        assert loaded.scores is None
    else:
        assert loaded.scores.dtype == scores.dtype
        assert torch.equal(loaded.scores, scores)


def header(**changes) -> dict:
    return {"names": ["a0.h2", "m1"], **COMPONENTS.header(), "provenance": {}} | changes


def sizes(**changes) -> dict:
    return header(dimensions=COMPONENTS.header()["dimensions"] | changes)


def without(key: str) -> dict:
    return {name: value for name, value in header().items() if name != key}


MASK = torch.tensor([False, False, True, False, False, False, False, True])


def test_the_header_of_these_tests_is_good(tmp_path):
    folder = save_artefact(tmp_path / "c", "circuit", Artefact(header(), {"mask": MASK}))
    assert Circuit.load(folder).nodes == ("a0.h2", "m1")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (header(names=["a0.h2"]), "contradicts itself"),
        (header(names=["a0.h1", "m1"]), "contradicts itself"),
        (sizes(n_layers=3), "contradicts itself"),
        (header(names=["a0.h9", "m1"]), "a0.h9"),
        (sizes(n_heads=2), "contradicts itself: mask"),
        (sizes(depth=2), "depth"),
        (header(names=None), "names is None; expected a list"),
        (sizes(n_layers="2"), "is not a circuit"),
        (header(sites=["heads", "headz"]), "headz"),
        (header(level="neurons"), "neurons"),
        (header(level="edges"), "n_layers"),
        (without("names"), "names"),
        (without("dimensions"), "dimensions"),
        (without("provenance"), "provenance"),
    ],
)
def test_a_damaged_or_contradicting_header_is_refused(tmp_path, changed, words):
    folder = save_artefact(tmp_path / "c", "circuit", Artefact(changed, {"mask": MASK}))
    with pytest.raises(ArtefactError, match=words) as caught:
        Circuit.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"mask": MASK[:-1]}, {"mask": ~MASK}, {"mask": MASK, "scores": torch.zeros(7)}],
    ids=["no mask", "short mask", "other mask", "short scores"],
)
def test_damaged_tensors_are_refused(tmp_path, tensors):
    folder = save_artefact(tmp_path / "c", "circuit", Artefact(header(), tensors))
    with pytest.raises(ArtefactError, match=str(folder)):
        Circuit.load(folder)


def test_overlap_by_hand():
    first = Circuit(COMPONENTS, ("a0.h0", "a0.h1", "m0"))
    second = Circuit(COMPONENTS, ("a0.h1", "m0", "m1"))
    empty = Circuit(COMPONENTS, ())
    assert jaccard(first, second) == jaccard(second, first) == 0.5
    assert jaccard(first, first) == 1.0
    assert jaccard(first, Circuit(COMPONENTS, ("m1",))) == 0.0
    assert jaccard(first, empty) == 0.0
    assert jaccard(empty, empty) == 1.0


def test_random_circuits_have_their_size_and_seed():
    drawn = random_circuits(COMPONENTS, 3, 20, seed=0)
    assert [len(circuit) for circuit in drawn] == [3] * 20
    assert len({circuit.nodes for circuit in drawn}) > 10
    assert drawn == random_circuits(COMPONENTS, 3, 20, seed=0)
    assert drawn[:5] == random_circuits(COMPONENTS, 3, 5, seed=0)
    assert drawn != random_circuits(COMPONENTS, 3, 20, seed=1)
    assert random_circuits(COMPONENTS, 0, 1, seed=0)[0].nodes == ()
    assert random_circuits(COMPONENTS, 8, 1, seed=0)[0].nodes == COMPONENTS.names
    assert random_circuits(COMPONENTS, 3, 0, seed=0) == []


def test_every_circuit_is_equally_likely():
    level = nodes(1, 3)
    counts = Counter(circuit.nodes for circuit in random_circuits(level, 2, 1200, seed=0))
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


@pytest.mark.parametrize("size", [-1, 9])
def test_a_size_that_the_model_does_not_have_is_refused(size):
    with pytest.raises(ConfigurationError, match=f"A circuit of {size} of 8 parts"):
        random_circuits(COMPONENTS, size, 1, seed=0)


def test_random_circuits_among_some_components_keep_the_others():
    level = nodes(3, 4)
    heads = level.select(["a*"])
    for circuit in random_circuits(level, 6, 20, 0, among=heads):
        assert len(circuit) == 6
        assert {"m0", "m1", "m2"} <= set(circuit.nodes)
    with pytest.raises(ConfigurationError):
        random_circuits(level, 2, 1, 0, among=heads)


GRAPH = Graph(2, 4, 2)
EDGES = ("input->a0.h1<q>", "input->a0.k0<v>", "a0.h1->m1", "m1->logits")


def test_a_circuit_of_edges_says_what_it_has():
    circuit = Circuit(GRAPH, EDGES[::-1], provenance={"edges_before_removal": 7})
    assert circuit.names == EDGES
    assert circuit.nodes == ("a0.h1", "m1")
    assert (circuit.level.has_one_stream, circuit.level.parts) == (False, "edges")
    sizes = {"nodes": 2, "nodes_total": 10, "edges": 4, "edges_total": len(GRAPH), "edges_before_removal": 7}
    assert circuit.counts() == sizes
    assert Circuit.from_patterns(GRAPH, ["m1->logits"]).names == ("m1->logits",)
    assert jaccard(circuit, Circuit(GRAPH, EDGES[:2])) == 0.5


def test_a_saved_circuit_of_edges_is_loaded(tmp_path):
    circuit = Circuit(GRAPH, EDGES, torch.rand(len(GRAPH)), {"fingerprint": "0a"})
    loaded = Circuit.load(circuit.save(tmp_path / "circuit"))
    assert loaded == circuit
    assert loaded.level == GRAPH
    assert torch.equal(loaded.scores, circuit.scores)


def test_edges_of_another_graph_are_refused(tmp_path):
    header = {"names": list(EDGES), **Graph(2, 4, 4).header(), "provenance": {}}
    save_artefact(tmp_path / "circuit", "circuit", Artefact(header, {"mask": torch.ones(len(GRAPH)).bool()}))
    with pytest.raises(OaTrainError, match="contradicts itself: mask"):
        Circuit.load(tmp_path / "circuit")
