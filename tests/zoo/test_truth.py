"""The edges that are needed, computed for models of which it is known."""

import json

import pytest
import torch

from oa_train.ablations.fitting import RefitSettings
from oa_train.errors import ConfigurationError
from oa_train.models.graph import Graph
from oa_train.zoo.truth import Truth, TruthSettings, _minimal, _reduced, _smallest, find_truth
from tests.known import Case, known_case

QUICK = TruthSettings(
    n_prompts=32,
    fit=RefitSettings(steps=60, batch_size=8, learning_rate=0.02, evaluate_every=30),
    n_starts=1,
    n_orders=1,
)


def truth_of(case: Case, kind: str, settings: TruthSettings = QUICK) -> Truth:
    found = find_truth(case.model, case.task, case.known.edges, kind, settings)
    for edges, without in zip(found.sets, found.without, strict=True):
        assert tuple(without) == edges
    assert found.margin > settings.tolerance
    assert max(found.kl) <= settings.tolerance
    return found


# What the edges that were meant have too many of: positions are the same in other prompts of the same length, and so
# is much of a counterfactual.
SPARED = {
    ("case_induction", "mean"): set(),
    ("case_induction", "resample"): {"input->a1.h0<q>", "input->a1.h0<k>"},
    ("case_induction", "counterfactual"): {
        "input->a1.h0<q>",
        "input->a1.h0<k>",
        "m0->a2.h0<q>",
        "input->a2.h0<v>",
    },
    ("two_hops", "mean"): set(),
    ("two_hops", "resample"): {"input->a0.h0<q>", "input->a0.h0<k>"},
    ("digit_sum", "mean"): set(),
    ("digit_sum", "resample"): set(),
    ("digit_sum", "counterfactual"): {"input->m1", "m1->m3"},
    ("backup_induction", "mean"): set(),
    ("backup_induction", "resample"): {"input->a1.h0<q>", "input->a1.h0<k>"},
    ("pair_induction", "mean"): set(),
    ("pair_induction", "resample"): set(),
    ("pair_induction", "counterfactual"): {
        "m0->a2.h0<q>",
        "a1.h0->a2.h0<q>",
        "a1.h0->a2.k0<k>",
        "input->a2.k0<v>",
    },
}


@pytest.mark.parametrize(("name", "kind"), SPARED)
def test_the_truth_of_a_kind(name: str, kind: str) -> None:
    case = known_case(name)
    found = truth_of(case, kind)
    assert found.necessary == found.sets[0]
    assert set(case.known.edges) - set(found.necessary) == SPARED[name, kind]
    assert set(found.necessary) <= set(case.known.edges)
    assert found.meant_kl < 1e-6
    assert found.margin > 0.5


def test_zeros_make_constants_necessary() -> None:
    case = known_case("digit_sum")
    found = truth_of(case, "zero")
    assert found.meant_kl > 1
    extra = set(found.necessary) - set(case.known.edges)
    assert set(case.known.edges) <= set(found.necessary)
    assert {"a0.h1->m3", "m0->m3", "m2->m3", "a0.h2->m2", "input->m0", "input->a0.h1<v>", "input->a0.h2<v>"} == extra


def test_trained_constants_bring_back_what_zeros_take() -> None:
    case = known_case("digit_sum")
    found = truth_of(case, "optimal")
    assert found.necessary == case.graph.kept(case.graph.mask(case.known.edges))
    assert found.margin > 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["case_induction", "two_hops", "digit_sum", "pair_induction"])
@pytest.mark.parametrize("seed", [0, 1])
def test_under_optimal_ablation_every_meant_edge_is_needed(name: str, seed: int) -> None:
    case = known_case(name, seed)
    found = truth_of(case, "optimal", TruthSettings())
    assert set(found.necessary) == set(case.known.edges)
    assert found.margin > 0.2


GRAPH = Graph(2, 2, 2)
WAYS = (
    ("input->a0.h0<v>", "a0.h0->logits"),
    ("input->a0.h1<v>", "a0.h1->logits"),
    ("input->m0", "m0->m1", "m1->logits"),
)


def enough_if_a_way_is_there(masks: torch.Tensor) -> torch.Tensor:
    ways = torch.stack([GRAPH.mask(way) for way in WAYS])
    whole = (masks.unsqueeze(1) | ~ways).all(dim=2).any(dim=1)
    return torch.where(whole, 0.0, 1.0)


def test_all_minimal_sets_below_a_start_are_found() -> None:
    start = GRAPH.mask([edge for way in WAYS for edge in way]).unsqueeze(0)
    found = _minimal(GRAPH, enough_if_a_way_is_there, start, 0.05)
    assert {frozenset(costs) for _, costs in found} == set(map(frozenset, WAYS))
    assert all(set(costs.values()) == {1.0} for _, costs in found)


def test_of_the_minimal_sets_the_smallest_are_told() -> None:
    start = GRAPH.mask([edge for way in WAYS for edge in way]).unsqueeze(0)
    found = _minimal(GRAPH, enough_if_a_way_is_there, start, 0.05)
    truth = _smallest(GRAPH, enough_if_a_way_is_there, found, "mean", 0.0)
    assert set(truth.sets) == set(WAYS[:2])
    assert truth.necessary == ()
    assert truth.kl == (0.0, 0.0)
    assert truth.margin == 1.0


@pytest.mark.parametrize("order", [0, 1, 2])
def test_all_edges_are_reduced_to_one_way(order: int) -> None:
    left = _reduced(GRAPH, enough_if_a_way_is_there, TruthSettings(), order)
    assert GRAPH.kept(left) in WAYS


def test_a_circuit_is_compared_with_the_set_it_agrees_with_best() -> None:
    graph = known_case("digit_sum").graph
    one, other = ("input->m0", "m0->logits"), ("input->m1", "m1->logits")
    truth = Truth("mean", graph, (one, other), (0.0, 0.0), ({}, {}), 0.0)
    figures = truth.recovery(graph.mask(other), graph.mask(other).float())
    assert (figures.precision, figures.recall, figures.auroc) == (1, 1, 1)
    assert truth.recovery(graph.mask(["input->m0"])).recall == 0.5
    assert truth.necessary == ()
    json.dumps(truth.as_json())


@pytest.mark.parametrize("name", ["tolerance", "n_prompts", "n_starts", "n_orders"])
def test_settings_that_cannot_work_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is 0"):
        TruthSettings(**{name: 0})
