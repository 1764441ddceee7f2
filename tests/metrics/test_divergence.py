"""The KL divergence against scipy and by its laws."""

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch.testing import assert_close

from oa_train.metrics.divergence import kl_divergence


def logits(seed: int, rows: int = 5, vocabulary: int = 37, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_equals_scipy(scale):
    clean, ablated = logits(0, scale=scale), logits(1, scale=scale)
    expected = rel_entr(softmax(clean.numpy(), axis=-1), softmax(ablated.numpy(), axis=-1)).sum(axis=-1)
    found = kl_divergence(clean, ablated)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_direction_by_hand():
    # Clean (1/2, 1/2), ablated (1/4, 3/4): log(4/3)/2 one way round, and not the other.
    half, quarter = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert float(kl_divergence(half, quarter)) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-13)
    other = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(kl_divergence(quarter, half)) == pytest.approx(other, rel=1e-13)


def test_zero_for_itself_and_otherwise_positive():
    clean = logits(0)
    assert torch.equal(kl_divergence(clean, clean), torch.zeros(5, dtype=torch.float64))
    for seed in range(1, 20):
        assert (kl_divergence(clean, logits(seed)) > 0).all()
        near = clean + 1e-4 * logits(seed)
        assert (kl_divergence(clean, near) >= 0).all()


def test_shifts_of_a_row_change_nothing():
    clean, ablated = logits(0), logits(1)
    shift = torch.arange(5, dtype=torch.float64).unsqueeze(1) * 7
    assert_close(kl_divergence(clean + shift, ablated - shift), kl_divergence(clean, ablated), rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_are_computed_in_float32(dtype):
    clean, ablated = logits(0).to(dtype), logits(1).to(dtype)
    found = kl_divergence(clean, ablated)
    assert found.dtype == torch.float32
    assert_close(found.double(), kl_divergence(clean.double(), ablated.double()), rtol=1e-5, atol=1e-6)


def test_gradient_is_the_difference_of_the_distributions():
    clean, ablated = logits(0), logits(1).requires_grad_()
    (gradient,) = torch.autograd.grad(kl_divergence(clean, ablated).sum(), ablated)
    expected = softmax(ablated.detach().numpy(), axis=-1) - softmax(clean.numpy(), axis=-1)
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-14)
