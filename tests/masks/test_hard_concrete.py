"""Hard concrete masks against closed forms and finite differences."""

import math

import pytest
import torch
from scipy import stats

from oa_train.errors import ConfigurationError
from oa_train.masks.hard_concrete import HardConcrete
from oa_train.seeds import torch_generator
from tests.builders import draw_masks

ROWS = 40_000
SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.5},
    {"lower": -0.3, "upper": 1.2},
    {"learned_temperature": True},
]
PUBLISHED = [{}, {"temperature": 0.3}, {"temperature": 1.5}, {"lower": -0.2, "upper": 1.3}]
LOGITS = [-3.0, -0.5, 0.0, 1.0, 3.0, 6.0]


def distribution(logits, **settings) -> HardConcrete:
    made = HardConcrete(len(logits), **settings).double()
    made.logits.data = torch.tensor(logits, dtype=torch.float64)
    return made


def assert_shares(masks, kept, ones):
    """The shares of samples that are not 0, and of those that are 1, within 4 standard errors."""
    drawn = draw_masks(masks, ROWS, torch_generator("shares")).detach()
    for found, expected in (((drawn != 0), kept), ((drawn == 1), ones)):
        error = (expected * (1 - expected) / ROWS).sqrt()
        assert ((found.double().mean(dim=0) - expected).abs() <= 4 * error).all()
    torch.testing.assert_close(masks.keep_probability(), kept)
    torch.testing.assert_close(masks.keep_probability().sum(), kept.sum())


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_share_of_zeros_and_ones_is_the_closed_form(settings):
    masks = distribution(LOGITS, **settings)
    beta, lower, upper = masks.temperature, masks.lower, masks.upper
    with torch.no_grad():
        kept = torch.sigmoid(masks.logits - beta * math.log(-lower / upper))
        ones = torch.sigmoid(masks.logits - beta * math.log((1 - lower) / (upper - 1)))
        assert_shares(masks, kept, ones)


@pytest.mark.parametrize("settings", PUBLISHED)
def test_the_share_of_zeros_and_ones_in_the_published_form(settings):
    masks = distribution(LOGITS, form="published", **settings)
    beta, lower, upper = masks.temperature, masks.lower, masks.upper
    # The uniform number at which the sample leaves 0, and the one at which it reaches 1.
    first, last = (
        (odds**beta / masks.logits.detach().exp() - 1e-3) / (1 + odds**beta / masks.logits.detach().exp())
        for odds in (value / (1 - value) for value in (-lower, 1 / (upper - lower) - lower))
    )
    with torch.no_grad():
        assert_shares(masks, 1 - first.clamp(min=0), 1 - last.clamp(min=0))


def test_the_published_form_is_what_the_published_code_draws():
    masks = distribution([0.4, -1.0], form="published")
    uniform = torch.rand(1000, 2, generator=torch_generator("same"), dtype=torch.float64)
    soft = torch.sigmoid(((uniform + 1e-3).log() - (1 - uniform).log() + masks.logits) / (2 / 3))
    torch.testing.assert_close(draw_masks(masks, 1000, torch_generator("same")), (1.2 * soft - 0.12).clamp(0, 1))
    # Entries with large logits are never ablated, and say so.
    certain = distribution([6.0], form="published")
    assert certain.keep_probability().item() == 1.0
    assert (draw_masks(certain, ROWS, torch_generator("certain")) > 0).all()


@pytest.mark.parametrize("form", ["standard", "published"])
def test_learned_temperatures_start_where_they_are_told_and_have_gradients(form):
    fixed = distribution([0.5, -0.5], form=form, temperature=0.4)
    masks = distribution([0.5, -0.5], form=form, temperature=0.4, learned_temperature=True)
    assert masks.temperatures().tolist() == pytest.approx([0.4, 0.4], abs=1e-6)
    drawn = draw_masks(masks, ROWS, torch_generator("learned"))
    torch.testing.assert_close(drawn, draw_masks(fixed, ROWS, torch_generator("learned")), atol=1e-5, rtol=0)
    for what in ((drawn**2).mean(), masks.keep_probability().sum()):
        (gradient,) = torch.autograd.grad(what, masks.raw_temperatures)
        assert (gradient != 0).all()
    assert {name for name, _ in masks.named_parameters()} == {"logits", "raw_temperatures"}
    assert {name for name, _ in fixed.named_parameters()} == {"logits"}


def test_gradients_of_a_learned_temperature_are_those_of_the_expected_loss():
    def mean_loss(raw: float) -> float:
        masks = distribution([0.4], learned_temperature=True)
        masks.raw_temperatures.data.fill_(raw)
        with torch.no_grad():
            return float((draw_masks(masks, 400_000, torch_generator("fine")) ** 2).mean())

    masks = distribution([0.4], learned_temperature=True)
    raw = masks.raw_temperatures.item()
    loss = (draw_masks(masks, 400_000, torch_generator("fine")) ** 2).mean()
    (gradient,) = torch.autograd.grad(loss, masks.raw_temperatures)
    assert gradient.item() == pytest.approx((mean_loss(raw + 1e-3) - mean_loss(raw - 1e-3)) / 2e-3, rel=1e-2)


def test_a_learned_temperature_stays_positive_wherever_its_parameter_goes():
    masks = distribution([0.3, -0.3], learned_temperature=True).float()
    masks.raw_temperatures.data = torch.tensor([-1e4, 1e4])
    assert (masks.temperatures() >= 1e-3).all()
    drawn = draw_masks(masks, 64, torch_generator("extremes"))
    gradients = torch.autograd.grad(drawn.sum() + masks.keep_probability().sum(), list(masks.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_between_zero_and_one_samples_follow_the_binary_concrete_distribution():
    masks = distribution([0.7])
    drawn = draw_masks(masks, ROWS, torch_generator("inside")).flatten().detach()
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
    drawn = draw_masks(masks, ROWS, torch_generator("gradient"))
    (total,) = torch.autograd.grad((drawn**2).mean(), masks.logits)
    derivative = (mean_loss(0.401) - mean_loss(0.399)) / 0.002
    assert float(total) == pytest.approx(derivative, rel=0.03)


@pytest.mark.parametrize("form", ["standard", "published"])
def test_the_same_generator_draws_the_same_masks_and_extremes_stay_finite(form):
    masks = distribution([-60.0, 0.0, 60.0], form=form)
    first, second = (draw_masks(masks, 8, torch_generator("same")) for _ in range(2))
    assert torch.equal(first, second)
    assert first[:, 0].eq(0).all()
    assert first[:, 2].eq(1).all()
    (gradient,) = torch.autograd.grad(first.sum() + masks.keep_probability().sum(), masks.logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 0.001, "learned_temperature": True}, "temperature is 0.001; expected more than 0.001"),
        ({"form": "published", "upper": 1.01}, r"The stretch is \(-0.1, 1.01\); the published form"),
        ({"lower": 0.0}, r"The stretch is \(0.0, 1.1\)"),
        ({"upper": 1.0}, r"The stretch is \(-0.1, 1.0\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        HardConcrete(3, **settings)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_form_is_refused_with_the_nearest():
    with pytest.raises(ConfigurationError, match=r"form is 'publisht'; expected one of .*Did you mean published\?"):
        HardConcrete(2, form="publisht")


def test_it_says_what_it_is():
    assert HardConcrete(2, temperature=0.5).describe() == {
        "class": "HardConcrete",
        "temperature": 0.5,
        "learned_temperature": False,
        "form": "standard",
        "lower": -0.1,
        "upper": 1.1,
    }
