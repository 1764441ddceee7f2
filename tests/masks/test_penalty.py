"""Penalties by hand, the controller of the target size in a model of the loss, and thresholds."""

import math

import pytest
import torch

from oa_train.errors import ConfigurationError
from oa_train.masks.base import check_threshold
from oa_train.masks.penalty import PROPORTIONAL_POWER, NodeRegulariser, SizePenalty, TargetSize, smooth_size
from oa_train.masks.uniform import UniformGradientSampling
from tests.builders import draw_masks


def test_value_and_gradient_by_hand():
    distribution = UniformGradientSampling(2).double()
    with torch.no_grad():
        distribution.logits.copy_(torch.tensor([0.0, math.log(3)]))
    penalty = SizePenalty(0.4)(distribution.keep_probability())
    assert penalty.item() == pytest.approx(0.4 * (0.5 + 0.75), abs=1e-7)
    (gradient,) = torch.autograd.grad(penalty, distribution.logits)
    assert gradient.tolist() == pytest.approx([0.4 * 0.25, 0.4 * 0.1875], abs=1e-7)


def test_no_weight_no_penalty():
    assert SizePenalty(0.0)(UniformGradientSampling(5).keep_probability()).item() == 0.0


def test_the_penalty_has_nothing_to_train():
    assert not list(SizePenalty(1.0).parameters())


@pytest.mark.parametrize("weight", [-1e-9, -1.0, math.nan, math.inf, -math.inf])
def test_a_weight_that_is_negative_or_not_finite_is_refused(weight):
    with pytest.raises(ConfigurationError, match="expected a price in nats") as caught:
        SizePenalty(weight)
    assert caught.value.exit_status == 2
    assert str(weight) in str(caught.value)


def test_the_weight_of_the_size_penalty_never_moves():
    penalty, distribution = SizePenalty(0.4), UniformGradientSampling(5)
    penalty.update(smooth_size_of(distribution), size_of(distribution))
    assert penalty.weight.item() == pytest.approx(0.4)
    assert not penalty.state_dict()
    assert penalty.objective(torch.tensor(0.5), kept_of(2, 5), 1).item() == pytest.approx(1.7)


def kept_of(size: int, n_entries: int) -> torch.Tensor:
    return torch.arange(n_entries) < size


def size_of(distribution) -> torch.Tensor:
    return distribution.threshold(0.5).sum()


def smooth_size_of(distribution) -> torch.Tensor:
    return smooth_size(distribution.keep_probability(), 0.5)


def masks_of(*thetas: float) -> UniformGradientSampling:
    distribution = UniformGradientSampling(len(thetas))
    with torch.no_grad():
        distribution.logits.copy_(torch.logit(torch.tensor(thetas)))
    return distribution


def test_the_weight_follows_its_rule():
    distribution = masks_of(
        0.9, 0.8, 0.6, 0.3
    )  # three are kept, 2.6 are expected; the fourth powers of the odds count 2.864
    penalty = TargetSize(2, 4, weight=0.1, warmup=2, rate=0.5)
    assert penalty.weight.item() == pytest.approx(0.1)
    moved = 0.0
    for goal in (3, 2, 2):  # from 4 to 2 in two steps, and no further
        penalty.update(smooth_size_of(distribution), size_of(distribution))
        moved += 0.5 * math.log(3 / goal)
        expected = 0.1 * math.exp(moved) * (2.86365 / goal) ** PROPORTIONAL_POWER
        assert penalty.weight.item() == pytest.approx(expected, rel=1e-5)
    value = penalty(distribution.keep_probability())
    assert value.item() == pytest.approx(expected * 2.6, rel=1e-5)
    (gradient,) = torch.autograd.grad(value, distribution.logits)
    assert gradient.tolist() == pytest.approx([expected * t * (1 - t) for t in (0.9, 0.8, 0.6, 0.3)], rel=1e-5)


def test_entries_that_are_nearly_off_do_not_count_towards_the_size_that_is_steered():
    probabilities = torch.tensor([4.0] * 5 + [-1.5] * 10).sigmoid()
    assert probabilities.sum() > 6.5
    assert smooth_size(probabilities, 0.5) == pytest.approx(5.0, abs=0.03)
    assert smooth_size(torch.full((2, 15), 0.8), 0.8).tolist() == pytest.approx([7.5, 7.5], abs=1e-3)
    assert smooth_size(torch.tensor([0.0, 1.0]), 0.5) == pytest.approx(1.0)


def test_components_that_are_always_kept_count_in_the_target_and_not_in_the_rule():
    distribution = masks_of(0.9, 0.8, 0.6, 0.3)
    penalties = [
        TargetSize(2, 4, weight=0.1, warmup=5),
        TargetSize(12, 4, weight=0.1, warmup=5, always_kept=10),
    ]
    for penalty in penalties:
        penalty.update(smooth_size_of(distribution), size_of(distribution) + penalty.always_kept)
    assert torch.equal(penalties[0].weight, penalties[1].weight)


@pytest.mark.parametrize("theta", [1e-6, 1 - 1e-6])
def test_the_weight_stays_positive_and_finite_at_the_extremes(theta):
    distribution = masks_of(*[theta] * 8)
    penalty = TargetSize(4, 8, weight=0.05, warmup=1)
    for _ in range(500):
        penalty.update(smooth_size_of(distribution), size_of(distribution))
    assert 0 < penalty.weight.item() < math.inf
    assert (penalty.weight > 0.05) == (theta > 0.5)


def test_the_weight_lives_in_the_state():
    distribution = masks_of(0.9, 0.7, 0.2)
    first, second = (TargetSize(1, 3, weight=0.05, warmup=4) for _ in range(2))
    for _ in range(3):
        first.update(smooth_size_of(distribution), size_of(distribution))
    assert set(first.state_dict()) == {"log_weight", "excess", "steps"}
    assert not list(first.parameters())
    second.load_state_dict(first.state_dict())
    for penalty in (first, second):
        penalty.update(smooth_size_of(distribution), size_of(distribution))
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(
    ("n_entries", "target", "scale"),
    [
        (15, 5, 1.0),
        (156, 80, 50.0),
        pytest.param(156, 20, 1.0, marks=pytest.mark.long),
        pytest.param(3000, 1000, 1.0, marks=pytest.mark.long),
    ],
)
def test_the_controller_leads_to_the_target_whatever_the_number_of_entries_and_the_scale(n_entries, target, scale):
    # Every entry is worth a fixed number of nats, spread over two orders of magnitude; the loss is their sum.
    generator = torch.Generator().manual_seed(0)
    worth = scale * 0.1 * torch.randn(n_entries, generator=generator).mul(2).exp()
    distribution = UniformGradientSampling(n_entries)
    penalty = TargetSize(target, n_entries, weight=0.12, warmup=200)
    optimizer = torch.optim.Adam(distribution.parameters(), lr=0.05, betas=(0.9, 0.995))
    for _ in range(500):
        loss = ((1 - draw_masks(distribution, 32, generator)) * worth).sum(dim=1).mean() + penalty(
            distribution.keep_probability()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalty.update(smooth_size_of(distribution), size_of(distribution))
    kept = distribution.threshold(0.5)
    assert abs(int(kept.sum()) - target) <= max(1, 0.05 * target)
    most_useful = worth.topk(target).indices
    assert kept[most_useful].sum() >= 0.95 * target - 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": 0}, r"target_size is 0; expected more than 0 and at most 8"),
        ({"target": -2.5}, r"target_size is -2.5; expected more than 0"),
        ({"target": 9}, r"target_size is 9; expected more than 0 and at most 8"),
        ({"target": math.nan}, r"target_size is nan"),
        ({"target": 3, "always_kept": 3}, "more than 3 and at most 11.*the 8 parts .* and the 3 that are always"),
        ({"warmup": 0}, "target_warmup is 0; expected at least 1"),
        ({"weight": 0.0}, "penalty_weight is 0; with target_size it is the price"),
        ({"weight": -1.0}, "penalty_weight is -1.0; expected a price in nats"),
    ],
)
def test_targets_that_cannot_be_reached_are_refused(changes, said):
    options = {"target": 4, "n_entries": 8, "weight": 0.1, "warmup": 10} | changes
    with pytest.raises(ConfigurationError, match=said) as caught:
        TargetSize(**options)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("level", [1e-9, 0.5, 0.999])
def test_a_probability_is_a_threshold(level):
    check_threshold(level)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf])
def test_anything_else_is_no_threshold(level):
    with pytest.raises(ConfigurationError, match=f"threshold is {level}; expected a keep-probability") as caught:
        check_threshold(level)
    assert caught.value.exit_status == 2


def test_the_regulariser_adds_up_to_as_much_as_its_formula_says():
    distribution = masks_of(0.9, 0.8, 0.6, 0.3)
    # Entry 1 stands at two nodes, entry 3 at none.
    entries, nodes = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 2, 2])
    regulariser = NodeRegulariser(0.5, entries, nodes, 3)
    by_hand = 0.5 * 1.5 * (math.tanh(1.7 / 1.5) + math.tanh(0.0) + math.tanh(1.4 / 1.5))
    assert regulariser(distribution.keep_probability()).item() == pytest.approx(by_hand, rel=1e-6)
    penalty = SizePenalty(0.2, regulariser)
    assert penalty(distribution.keep_probability()).item() == pytest.approx(0.2 * (2.6 + by_hand), rel=1e-6)
    assert not penalty.state_dict()
    target = TargetSize(2, 4, weight=0.1, warmup=2, regulariser=regulariser)
    assert target(distribution.keep_probability()).item() == pytest.approx(0.1 * (2.6 + by_hand), rel=1e-6)


def test_the_last_edges_of_a_node_cost_more_than_those_of_a_busy_one():
    regulariser = NodeRegulariser(1.0, torch.arange(9), torch.tensor([0] * 8 + [1]), 4)
    distribution = UniformGradientSampling(9)
    (gradient,) = torch.autograd.grad(regulariser(distribution.keep_probability()), distribution.logits)
    assert gradient[8] > 5 * gradient[0] > 0


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_regulariser_without_a_sense_is_refused(weight):
    with pytest.raises(ConfigurationError, match="node_penalty is"):
        NodeRegulariser(weight, torch.arange(2), torch.arange(2), 2)


def test_circuits_side_by_side_have_the_weights_that_they_have_alone():
    several = [masks_of(0.9, 0.8, 0.6, 0.3), masks_of(0.2, 0.9, 0.9, 0.9)]
    probabilities = torch.stack([masks.keep_probability() for masks in several])
    sizes = torch.stack([size_of(masks) for masks in several])
    together = TargetSize([2, 3], 4, weight=[0.1, 0.4], warmup=2)
    alone = [TargetSize(2, 4, weight=0.1, warmup=2), TargetSize(3, 4, weight=0.4, warmup=2)]
    for _ in range(3):
        together.update(smooth_size(probabilities, 0.5), sizes)
        for penalty, masks in zip(alone, several, strict=True):
            penalty.update(smooth_size_of(masks), size_of(masks))
    torch.testing.assert_close(together.weight, torch.stack([penalty.weight for penalty in alone]))
    torch.testing.assert_close(
        together(probabilities), torch.stack([p(m.keep_probability()) for p, m in zip(alone, several, strict=True)])
    )
    loss = torch.tensor([0.1, 0.2])
    kept = torch.stack([masks.threshold(0.5) for masks in several])
    expected = torch.stack([p.objective(lost, mask, 0) for p, lost, mask in zip(alone, loss, kept, strict=True)])
    torch.testing.assert_close(together.objective(loss, kept, 0), expected)
    fixed = SizePenalty([0.1, 0.2], NodeRegulariser(0.5, torch.tensor([0, 1]), torch.tensor([0, 0]), 2))
    second = SizePenalty(0.2, fixed.regulariser)
    torch.testing.assert_close(fixed(probabilities)[1], second(probabilities[1]))


def test_entries_may_count_differently_in_what_is_paid_but_not_in_a_target_size():
    distribution, relative = masks_of(0.9, 0.8, 0.6, 0.3), torch.tensor([1.0, 0.1, 0.1, 1.0])
    paid = 0.9 + 0.08 + 0.06 + 0.3
    fixed = SizePenalty(0.2, relative=relative)
    assert fixed(distribution.keep_probability()).item() == pytest.approx(0.2 * paid)
    objective = fixed.objective(torch.tensor(0.5), distribution.threshold(0.5), 2)
    assert objective.item() == pytest.approx(0.5 + 0.2 * (1.0 + 0.1 + 0.1 + 2))
    weighted, plain = (TargetSize(3, 4, weight=0.1, warmup=1, relative=each) for each in (relative, None))
    for penalty in (weighted, plain):
        penalty.update(smooth_size_of(distribution), size_of(distribution))
        assert penalty.objective(torch.tensor(0.5), distribution.threshold(0.5), 0) == 0.5
    assert torch.equal(weighted.weight, plain.weight)
    assert weighted(distribution.keep_probability()).item() == pytest.approx(weighted.weight.item() * paid)
