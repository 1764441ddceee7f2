"""The size penalty by hand, and thresholds that are probabilities."""

import math

import pytest
import torch

from oa_train.errors import ConfigurationError
from oa_train.masks.base import check_threshold
from oa_train.masks.penalties import SizePenalty
from oa_train.masks.uniform import UniformGradientSampling


def test_value_and_gradient_by_hand():
    distribution = UniformGradientSampling(2).double()
    with torch.no_grad():
        distribution.logits.copy_(torch.tensor([0.0, math.log(3)]))
    penalty = SizePenalty(0.4)(distribution)
    assert penalty.item() == pytest.approx(0.4 * (0.5 + 0.75), abs=1e-7)
    (gradient,) = torch.autograd.grad(penalty, distribution.logits)
    assert gradient.tolist() == pytest.approx([0.4 * 0.25, 0.4 * 0.1875], abs=1e-7)


def test_no_price_no_penalty():
    assert SizePenalty(0.0)(UniformGradientSampling(5)).item() == 0.0


def test_the_penalty_has_nothing_to_train():
    assert not list(SizePenalty(1.0).parameters())


@pytest.mark.parametrize("weight", [-1e-9, -1.0, math.nan, math.inf, -math.inf])
def test_a_price_that_is_negative_or_not_finite_is_refused(weight):
    with pytest.raises(ConfigurationError, match="expected a price in nats") as caught:
        SizePenalty(weight)
    assert caught.value.exit_status == 2
    assert str(weight) in str(caught.value)


@pytest.mark.parametrize("level", [1e-9, 0.5, 0.999])
def test_a_probability_is_a_threshold(level):
    assert check_threshold(level) == level


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf])
def test_anything_else_is_no_threshold(level):
    with pytest.raises(ConfigurationError, match=f"threshold is {level}; expected a keep-probability") as caught:
        check_threshold(level)
    assert caught.value.exit_status == 2
