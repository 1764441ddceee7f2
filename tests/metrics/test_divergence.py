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


# Which tokens each of the two models rules out, of 37; `0 log 0` counts as 0.
RULED_OUT = {
    "both": (range(32, 37), range(32, 37)),
    "clean alone": (range(30, 37), ()),
    "more by clean": ((3, 5, 36), (5,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", RULED_OUT)
def test_tokens_that_the_clean_model_rules_out_add_nothing(case, dtype):
    by_clean, by_ablated = map(list, RULED_OUT[case])
    clean, ablated = logits(0).to(dtype), logits(1).to(dtype)
    clean[:, by_clean] = ablated[:, by_ablated] = -math.inf
    found = kl_divergence(clean, ablated.requires_grad_())
    (gradient,) = torch.autograd.grad(found.sum(), ablated)
    kept = [token for token in range(37) if token not in by_clean]
    log_q = ablated.detach().log_softmax(dim=-1)[:, kept]
    log_p = clean[:, kept].log_softmax(dim=-1)
    assert_close(found.detach(), (log_p.exp() * (log_p - log_q)).sum(dim=-1))
    assert_close(gradient, ablated.detach().softmax(dim=-1) - clean.softmax(dim=-1))


def test_columns_that_both_rule_out_could_as_well_be_dropped():
    clean, ablated = logits(0), logits(1)
    dropped = ablated[:, :-5].clone().requires_grad_()
    clean[:, -5:] = ablated[:, -5:] = -math.inf
    expected, found = kl_divergence(clean[:, :-5], dropped), kl_divergence(clean, ablated.requires_grad_())
    assert_close(found, expected, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(found.sum(), ablated)[0], torch.autograd.grad(expected.sum(), dropped)[0]
    assert_close(gradients[0][:, :-5], gradients[1], rtol=1e-12, atol=1e-15)
    assert not gradients[0][:, -5:].any()


def test_a_token_that_the_ablated_model_alone_rules_out_is_infinitely_far():
    clean, ablated = logits(0), logits(1)
    ablated[0, 3] = -math.inf
    found = kl_divergence(clean, ablated)
    assert found[0] == math.inf
    assert found[1:].isfinite().all()
    # Its probability is too small for float32, and counts as none.
    clean[0, 3] = -1e4
    assert kl_divergence(clean, ablated).isfinite().all()
