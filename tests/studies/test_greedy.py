"""The search for a small sufficient set, on recoveries that are written down."""

import pytest
import torch

from oa_train.studies.greedy import Budget, GreedySearch

EVERYTHING, NOTHING = torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)


def searched(measure, start, target=0.9, scores=None, **budget):
    search = GreedySearch(measure, EVERYTHING, target, Budget(**{"candidates": 12, "pairs": 66} | budget), scores)
    return search.run(start)


def units(step):
    return set(step.mask.nonzero().flatten().tolist())


def of_all(*needed):
    """Recovery 1 where all of some units are kept, else 0."""
    return lambda masks: masks[:, list(needed)].all(dim=1).double()


def weighted(masks):
    """Independent units of falling weight."""
    weights = 2.0 ** -torch.arange(12).double()
    return (masks * weights).sum(dim=1) / weights.sum()


def test_independent_units_are_restored_by_weight():
    steps = searched(weighted, NOTHING)
    assert [step.restored for step in steps[1:]] == [(0,), (1,), (2,), (3,)]
    assert units(searched(weighted, EVERYTHING)[-1]) == {0, 1, 2, 3}


@pytest.mark.parametrize("start", [NOTHING, EVERYTHING])
@pytest.mark.parametrize("needed", [(4,), (2, 9), (0, 5, 11), (1, 2, 6, 10)])
def test_units_that_only_help_together(start, needed):
    steps = searched(of_all(*needed), start)
    assert units(steps[-1]) == set(needed)
    if start is NOTHING:
        (step,) = steps[1:]
        assert step.move == {1: "restore", 2: "restore pair"}.get(len(needed), "restore group")


def test_a_group_takes_few_circuits():
    steps = searched(of_all(1, 2, 6, 10), NOTHING, pairs=0)
    assert units(steps[-1]) == {1, 2, 6, 10}
    assert steps[1].tried < 12 + 25  # all alone, then halves


def balanced(masks):
    """0 is needed, 1 and 2 balance each other, and every unit adds a little."""
    zero, one, two = masks[:, 0], masks[:, 1], masks[:, 2]
    return (0.95 * zero * (one == two)).double() + (0.05 * masks.double().mean(dim=1))


def test_two_that_balance_each_other_are_removed_as_a_pair():
    steps = searched(balanced, EVERYTHING)
    assert units(steps[-1]) == {0}
    assert "remove pair" in [step.move for step in steps]
    stuck = searched(balanced, EVERYTHING, pairs=0)
    assert units(stuck[-1]) == {0, 1, 2}


def replaceable(masks):
    """0 and 1 together do what 2 does alone, and 3 is needed."""
    return (masks[:, 3] & (masks[:, 2] | (masks[:, 0] & masks[:, 1]))).double()


def test_two_are_swapped_for_one():
    start = NOTHING.clone()
    start[[0, 1, 3]] = True
    steps = searched(replaceable, start)
    assert units(steps[-1]) == {2, 3}
    assert (steps[-1].move, set(steps[-1].removed), steps[-1].restored) == ("swap", {0, 1}, (2,))


def test_several_at_once_end_at_the_same_set():
    first, last = searched(of_all(3, 7), EVERYTHING), searched(of_all(3, 7), EVERYTHING, at_once=8)
    assert units(first[-1]) == units(last[-1]) == {3, 7}
    assert len(last) < len(first)
    (step,) = searched(weighted, NOTHING, at_once=8)[1:]
    assert step.restored == (0, 1, 2, 3)


def test_few_candidates_follow_the_scores_and_are_enough():
    scores = -torch.arange(12).float()
    steps = searched(lambda masks: weighted(masks.flip(1)), NOTHING, scores=-scores, candidates=2, pairs=0)
    assert units(steps[-1]) == {8, 9, 10, 11}
    assert all(step.screened and step.tried <= 3 for step in steps[1:])
    turned = searched(weighted, NOTHING, scores=-scores, candidates=2, pairs=0)
    assert units(turned[-1]) >= {0, 1, 2}
    without = searched(weighted, NOTHING, candidates=2, pairs=0)
    assert (without[1].tried, without[1].screened) == (12, False)  # nothing says where to begin
    assert units(without[-1]) == {0, 1, 2, 3}


def test_a_start_that_is_not_enough_is_restored_first():
    start = NOTHING.clone()
    start[[5, 6]] = True
    steps = searched(of_all(5, 8), start)
    assert [step.move for step in steps] == ["start", "restore", "remove"]
    assert units(steps[-1]) == {5, 8}


@pytest.mark.parametrize("seed", range(5))
def test_a_greedy_search_is_the_obvious_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(12, generator=generator, dtype=torch.float64)
    joint = torch.rand(12, 12, generator=generator, dtype=torch.float64).triu(1) / 12

    def measure(masks):
        kept = masks.double()
        value = kept @ weights + torch.einsum("ci,ij,cj->c", kept, joint, kept)
        return value / (weights.sum() + joint.sum())

    mask = EVERYTHING.clone()
    while True:
        best = None
        for unit in range(12):
            fewer = mask.clone()
            fewer[unit] = False
            if mask[unit] and measure(fewer[None])[0] >= 0.7 and (best is None or measure(fewer[None])[0] > best[0]):
                best = measure(fewer[None])[0], fewer
        if best is None:
            break
        mask = best[1]
    assert torch.equal(searched(measure, EVERYTHING, 0.7, pairs=0)[-1].mask, mask)
