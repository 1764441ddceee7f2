"""Hard concrete masks against closed forms and finite differences."""

import math

import pytest
import torch
from scipy import stats

from oa_train.errors import ConfigurationError
from oa_train.masks.hard_concrete import HardConcrete
from oa_train.seeds import torch_generator

ROWS = 40_000
SETTINGS = [{}, {"temperature": 0.3}, {"lower": -0.3, "upper": 1.2}]


def distribution(logits, **settings) -> HardConcrete:
    made = HardConcrete(len(logits), **settings).double()
    made.logits.data = torch.tensor(logits, dtype=torch.float64)
    return made


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_share_of_zeros_and_ones_is_the_closed_form(settings):
    masks = distribution([-3.0, -0.5, 0.0, 1.0, 3.0], **settings)
    drawn = masks.sample(ROWS, torch_generator("shares"))
    beta, lower, upper = masks.temperature, masks.lower, masks.upper
    kept = torch.sigmoid(masks.logits - beta * math.log(-lower / upper))
    ones = 1 - torch.sigmoid(beta * math.log((1 - lower) / (upper - 1)) - masks.logits)
    for found, expected in (((drawn != 0), kept), ((drawn == 1), ones)):
        error = (expected * (1 - expected) / ROWS).sqrt()
        assert ((found.double().mean(dim=0) - expected).abs() <= 4 * error).all()
    torch.testing.assert_close(masks.keep_probability(), kept)
    torch.testing.assert_close(masks.expected_size(), kept.sum())


def test_between_zero_and_one_samples_follow_the_binary_concrete_distribution():
    masks = distribution([0.7])
    drawn = masks.sample(ROWS, torch_generator("inside")).flatten().detach()
    inside = drawn[(drawn > 0) & (drawn < 1)].numpy()

    def cumulative(value):
        stretched = torch.logit(torch.as_tensor((value - masks.lower) / (masks.upper - masks.lower)))
        return torch.sigmoid(masks.temperature * stretched - 0.7).numpy()

    low, high = cumulative(0.0), cumulative(1.0)
    assert stats.kstest(inside, lambda value: (cumulative(value) - low) / (high - low)).pvalue > 0.001


def test_gradients_are_those_of_the_expected_loss():
    # One entry and a smooth loss: the mean gradient is the derivative of the mean, here taken numerically over
    # the same draws of a fine grid of noise.
    def mean_loss(logit: float) -> float:
        uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        soft = torch.sigmoid((torch.logit(uniform) + logit) / (2 / 3))
        return float(((soft * 1.2 - 0.1).clamp(0, 1) ** 2).mean())

    masks = distribution([0.4])
    drawn = masks.sample(ROWS, torch_generator("gradient"))
    (total,) = torch.autograd.grad((drawn**2).mean(), masks.logits)
    derivative = (mean_loss(0.401) - mean_loss(0.399)) / 0.002
    assert float(total) == pytest.approx(derivative, rel=0.03)


def test_the_same_generator_draws_the_same_masks_and_extremes_stay_finite():
    masks = distribution([-60.0, 0.0, 60.0])
    first, second = (masks.sample(8, torch_generator("same")) for _ in range(2))
    assert torch.equal(first, second)
    assert first[:, 0].eq(0).all()
    assert first[:, 2].eq(1).all()
    (gradient,) = torch.autograd.grad(first.sum() + masks.expected_size(), masks.logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"lower": 0.0}, r"The stretch is \(0.0, 1.1\)"),
        ({"upper": 1.0}, r"The stretch is \(-0.1, 1.0\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        HardConcrete(3, **settings)


def test_it_says_what_it_is():
    assert HardConcrete(2, temperature=0.5).describe() == {
        "class": "HardConcrete",
        "temperature": 0.5,
        "lower": -0.1,
        "upper": 1.1,
    }
