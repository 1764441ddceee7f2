"""Uniform gradient sampling: its distribution in closed form, and the law that its gradient obeys."""

import math

import pytest
import torch
from scipy import stats

from oa_train.errors import ConfigurationError
from oa_train.masks.uniform import UniformGradientSampling
from tests.builders import draw_masks

SCALES = [0.5, 1.0, 2.0]
THETAS = [0.05, 0.3, 0.5, 0.9]


def sampler(*thetas: float, **options) -> UniformGradientSampling:
    """A float64 distribution with these keep-probabilities."""
    distribution = UniformGradientSampling(len(thetas), **options).double()
    with torch.no_grad():
        distribution.logits.copy_(torch.logit(torch.tensor(thetas, dtype=torch.float64)))
    return distribution


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("theta", THETAS)
def test_distribution_in_closed_form(theta, scale):
    n = 100_000
    mask = draw_masks(sampler(theta, window_scale=scale), n, generator()).detach().squeeze(1)
    assert mask.min() >= 0
    assert mask.max() <= 1
    window = scale * theta * (1 - theta)
    shares = {
        "zero": ((mask == 0).double().mean(), 1 - theta - window / 2),
        "one": ((mask == 1).double().mean(), theta - window / 2),
        "between": (((mask > 0) & (mask < 1)).double().mean(), window),
    }
    for found, expected in shares.values():
        assert abs(float(found) - expected) <= 4 * math.sqrt(expected * (1 - expected) / n) + 1e-12
    assert abs(float(mask.mean()) - theta) < 4 * float(mask.std()) / math.sqrt(n)
    inside = mask[(mask > 0) & (mask < 1)]
    assert stats.kstest(inside.numpy(), "uniform").pvalue > 1e-4


def test_entries_and_rows_are_independent():
    n = 100_000
    mask = draw_masks(sampler(0.5, 0.5), n, generator()).detach()
    for first, second in ((mask[:, 0], mask[:, 1]), (mask[:-1, 0], mask[1:, 0]), (mask[:-1, 0], mask[1:, 1])):
        assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(n)


LOSSES = {
    "square": lambda m: (m - 0.3) ** 2,
    "steep": lambda m: torch.exp(3 * m),
    "wave": lambda m: torch.sin(7 * m) + m,
    "convex and falling": lambda m: 1 / (0.2 + m),
}


def mean_gradient(distribution, loss_of_rows, n_draws=300, n_rows=400):
    """Mean gradient of the logits over independent draws, and the standard error of that mean."""
    draws = []
    for seed in range(n_draws):
        mask = draw_masks(distribution, n_rows, generator(seed))
        draws += torch.autograd.grad(loss_of_rows(mask).mean(), distribution.logits)
    gradients = torch.stack(draws)
    return gradients.mean(dim=0), gradients.std(dim=0) / math.sqrt(n_draws)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("theta", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_one_component_estimates_what_it_is_worth(name, theta, scale):
    loss = LOSSES[name]
    distribution = sampler(theta, window_scale=scale, count_normalization="expected")
    found, error = mean_gradient(distribution, lambda mask: loss(mask[:, 0]))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    ablated, kept = loss(ends)
    expected = theta * (1 - theta) * (kept - ablated)
    assert abs(float(found[0] - expected)) < 4 * float(error[0])
    # The law has teeth: the error is small beside what is estimated.
    assert 4 * float(error[0]) < 0.2 * abs(float(expected))


def test_the_gradient_of_an_additive_model_estimates_every_entry():
    thetas = (0.1, 0.5, 0.8, 0.6)
    distribution = sampler(*thetas, count_normalization="expected")
    losses = list(LOSSES.values())
    found, error = mean_gradient(distribution, lambda mask: sum(f(mask[:, i]) for i, f in enumerate(losses)))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for i, (theta, loss) in enumerate(zip(thetas, losses, strict=True)):
        expected = theta * (1 - theta) * float(loss(ends)[1] - loss(ends)[0])
        assert abs(float(found[i]) - expected) < 4 * float(error[i])


def test_the_gradient_of_a_product_is_what_an_entry_is_worth_on_average_over_the_others():
    thetas = (0.3, 0.7)
    distribution = sampler(*thetas, count_normalization="expected")
    found, error = mean_gradient(distribution, lambda mask: (1 + mask[:, 0] ** 2) * torch.exp(mask[:, 1]))
    theta, other = thetas
    window = other * (1 - other)
    mean_of_other = (1 - other - window / 2) + (other - window / 2) * math.e + window * (math.e - 1)
    assert abs(float(found[0]) - theta * (1 - theta) * mean_of_other) < 4 * float(error[0])


def test_empirical_is_the_mean_over_the_rows_in_the_window():
    thetas = (0.5, 0.2, 0.5)
    distribution = sampler(*thetas)
    mask = draw_masks(distribution, 12, generator(1))
    weights = torch.linspace(-1, 2, 36, dtype=torch.float64).view(12, 3)
    (found,) = torch.autograd.grad((weights * mask**2).sum(dim=1).mean(), distribution.logits)
    for entry, theta in enumerate(thetas):
        rows = [row for row in range(12) if 0 < mask[row, entry].item() < 1]
        slopes = [2 * float(weights[row, entry] * mask[row, entry].detach()) for row in rows]
        by_hand = theta * (1 - theta) * sum(slopes) / len(slopes)
        assert float(found[entry]) == pytest.approx(by_hand, rel=1e-6)


def test_an_entry_without_rows_in_the_window_has_no_gradient():
    distribution = sampler(0.001, 0.5, 0.999)
    mask = draw_masks(distribution, 8, generator())
    assert ((mask[:, [0, 2]] == 0) | (mask[:, [0, 2]] == 1)).all()
    (found,) = torch.autograd.grad((mask * torch.tensor([3.0, 1.0, 5.0])).sum(), distribution.logits)
    assert found[0] == 0
    assert found[1] != 0
    assert found[2] == 0


def test_both_normalizations_draw_the_same_masks():
    first = draw_masks(sampler(0.3, 0.6), 50, generator(5))
    assert torch.equal(first, draw_masks(sampler(0.3, 0.6, count_normalization="expected"), 50, generator(5)))
    assert not torch.equal(first, draw_masks(sampler(0.3, 0.6), 50, generator(6)))


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draw_masks(sampler(0.3), 50, generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalization", ["empirical", "expected"])
def test_extreme_logits_stay_finite(normalization, dtype):
    distribution = UniformGradientSampling(2, count_normalization=normalization).to(dtype)
    with torch.no_grad():
        distribution.logits.copy_(torch.tensor([-30.0, 30.0]))
    mask = draw_masks(distribution, 10_000, generator())
    assert mask.isfinite().all()
    assert (mask[:, 0] == 0).double().mean() > 0.99
    assert (mask[:, 1] == 1).double().mean() > 0.99
    (gradient,) = torch.autograd.grad((mask**2).mean(), distribution.logits)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e-6


def test_size_threshold_and_start():
    distribution = UniformGradientSampling(3)
    assert distribution.logits.tolist() == [1.0, 1.0, 1.0]
    distribution = sampler(0.2, 0.5, 0.7)
    torch.testing.assert_close(distribution.keep_probability().tolist(), [0.2, 0.5, 0.7], rtol=0, atol=1e-15)
    size = distribution.keep_probability().sum()
    assert size.item() == pytest.approx(1.4, abs=1e-14)
    (gradient,) = torch.autograd.grad(size, distribution.logits)
    torch.testing.assert_close(gradient.tolist(), [0.16, 0.25, 0.21], rtol=0, atol=1e-14)
    assert distribution.threshold(0.6).tolist() == [False, False, True]
    assert distribution.threshold(0.1).tolist() == [True, True, True]


def test_the_threshold_itself_is_not_kept():
    distribution = UniformGradientSampling(2, initial_logit=0.0)
    assert distribution.keep_probability().tolist() == [0.5, 0.5]
    assert distribution.threshold(0.5).tolist() == [False, False]
    assert distribution.threshold(0.4999).tolist() == [True, True]
    assert not distribution.threshold(0.4).requires_grad


def test_it_describes_itself():
    described = UniformGradientSampling(2, window_scale=1.5, count_normalization="expected").describe()
    assert described == {
        "class": "UniformGradientSampling",
        "window_scale": 1.5,
        "count_normalization": "expected",
    }


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.001, math.nan, math.inf])
def test_a_window_that_leaves_the_interval_is_refused(scale):
    with pytest.raises(ConfigurationError, match=r"window_scale is .*; expected more than 0 and at most 2"):
        UniformGradientSampling(2, window_scale=scale)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_normalization_is_refused_with_the_nearest():
    with pytest.raises(ConfigurationError, match=r"'expectd'; expected one of .*Did you mean expected\?"):
        UniformGradientSampling(2, count_normalization="expectd")
