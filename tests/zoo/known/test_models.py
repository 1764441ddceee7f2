"""Every hand-written model solves its task by its edges, and its distractors do what they are meant to."""

import pytest
import torch

from oa_train.ablations.evaluation import clean_behaviour
from oa_train.models.graph import Graph
from oa_train.zoo.known import KNOWN_MODELS
from tests.known import known_case

N_EDGES = {"case_induction": 262, "two_hops": 309, "digit_sum": 297, "pair_induction": 190, "backup_induction": 309}
N_MEANT = {"case_induction": 9, "two_hops": 11, "digit_sum": 7, "pair_induction": 9, "backup_induction": 9}

# Sources of each model: one that writes a constant it relies on; the source of the sign and the MLP that reads it; two
# that cancel each other; some that write where nothing reads.
CONSTANT = {
    "case_induction": "a0.h0",
    "two_hops": "a0.h1",
    "digit_sum": "a0.h1",
    "pair_induction": "a0.h0",
    "backup_induction": "a0.h0",
}
SIGN = {
    "case_induction": "a1.h1",
    "two_hops": "a1.h1",
    "digit_sum": "a0.h2",
    "pair_induction": "a0.h1",
    "backup_induction": "a1.h1",
}
ABSOLUTE = {
    "case_induction": "m1",
    "two_hops": "m2",
    "digit_sum": "m2",
    "pair_induction": "m1",
    "backup_induction": "m2",
}
CANCELLING = {
    "case_induction": ("a1.h2", "a1.h3"),
    "two_hops": ("a3.h0", "a3.h1"),
    "digit_sum": ("a1.h0", "a1.h1"),
    "pair_induction": ("a1.h2", "a1.h3"),
    "backup_induction": ("a2.h2", "a3.h2"),
}
JUNK = {
    "case_induction": ("a0.h1", "a0.h2", "a2.h1", "a2.h3"),
    "two_hops": ("a0.h2", "a1.h2", "a2.h2", "a3.h2"),
    "digit_sum": ("a1.h2", "a2.h1", "a3.h0", "a3.h2"),
    "pair_induction": ("a0.h2", "a0.h3", "a2.h1", "a2.h2"),
    "backup_induction": ("a0.h2", "a1.h2", "a2.h1", "a3.h1"),
}
# Nodes on the way that was written by hand, without the one that has a backup.
TRUE = {
    "case_induction": ("m0", "a1.h0", "a2.h0", "m2"),
    "two_hops": ("a0.h0", "a1.h0", "a2.h0", "m3"),
    "digit_sum": ("a0.h0", "m1", "a2.h0", "m3"),
    "pair_induction": ("m0", "a1.h0", "a1.h1", "a2.h0", "m2"),
    "backup_induction": ("m0", "a1.h0", "m3"),
}

every_model = pytest.mark.parametrize("name", KNOWN_MODELS)


@every_model
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_task_is_solved(name: str, seed: int) -> None:
    case = known_case(name, seed)
    found = clean_behaviour(case.model, case.task.batches("test", 128))
    assert found.accuracy.min() == 1
    assert found.cross_entropy.max() < 0.002


@every_model
def test_sizes_and_edges(name: str) -> None:
    case = known_case(name)
    assert len(case.graph) == N_EDGES[name]
    assert case.graph.mask(case.known.edges).sum() == N_MEANT[name]


@every_model
@pytest.mark.parametrize("seed", [0, 1])
def test_the_edges_alone_are_enough_unless_zeros_stand_in(name: str, seed: int) -> None:
    case = known_case(name, seed)
    meant = case.graph.mask(case.known.edges).unsqueeze(0)
    for kind in ("mean", "resample", "counterfactual", "counterfactual_mean"):
        assert case.kl(meant, kind).abs() < 1e-6, kind
    assert case.kl(meant, "zero") > 1


@every_model
@pytest.mark.parametrize("seed", [0, 1])
def test_without_a_true_node_nothing_is_left(name: str, seed: int) -> None:
    case = known_case(name, seed)
    masks = torch.stack([case.without_source(node) for node in TRUE[name]])
    # In pair_induction one of the two letters leaves the choice among two answers.
    least = 0.6 if name == "pair_induction" else 1
    assert case.kl(masks, "resample").min() > 1
    assert case.kl(masks, "mean").min() > least


@every_model
@pytest.mark.parametrize("seed", [0, 1])
def test_distractors_fool_the_ablations_that_they_are_meant_to(name: str, seed: int) -> None:
    case = known_case(name, seed)
    one, other = CANCELLING[name]
    parts = [CONSTANT[name], SIGN[name], ABSOLUTE[name], one, other]
    masks = torch.stack([*(case.without_source(part) for part in parts), case.without_source(one, other)])
    zero, mean, resample = (case.kl(masks, kind) for kind in ("zero", "mean", "resample"))
    assert zero[:3].min() > 1
    assert mean[[0, 2]].abs().max() < 1e-5
    assert mean[1] > 0.1
    assert resample[:3].abs().max() < 1e-5
    assert resample[3:5].min() > 1e-3
    for found in (zero, mean, resample):
        assert found[5].abs() < 1e-5


@every_model
@pytest.mark.parametrize("seed", [0, 1])
def test_junk_is_active_and_changes_nothing(name: str, seed: int) -> None:
    case = known_case(name, seed)
    masks = torch.stack([case.without_source(part) for part in JUNK[name]])
    for kind in ("zero", "resample"):
        assert case.kl(masks, kind).abs().max() < 1e-5
    values = case.heads()
    for part in JUNK[name]:
        layer, head = (int(number) for number in part[1:].split(".h"))
        assert values[layer, :, :, head].std(dim=0).max() > 0.1, part


@every_model
def test_seeds_draw_the_junk_and_nothing_else(name: str) -> None:
    same, other = (KNOWN_MODELS[name](seed).model for seed in (0, 1))
    assert all(map(torch.equal, KNOWN_MODELS[name](0).model.parameters(), same.parameters()))
    changed = [not torch.equal(*pair) for pair in zip(same.parameters(), other.parameters(), strict=True)]
    assert any(changed)
    assert Graph.of(same.config) == Graph.of(other.config)
    assert torch.equal(same.get_output_embeddings().weight, other.get_output_embeddings().weight)
