"""Recovered shares and how sharply they are localised."""

import pytest
import torch

from oa_train.errors import NotFiniteError
from oa_train.metrics.ranks import linear_correlation, rank_correlation
from oa_train.metrics.recovered import effective_layers, recovered, recovered_bootstrap

LOST = torch.tensor([[0.2, 0.4, 0.0, 0.2], [0.4, 0.8, 0.4, 0.4], [0.5, 0.9, 0.5, 0.5]], dtype=torch.float64)
WITHOUT = torch.tensor([0.4, 0.8, 0.4, 0.4], dtype=torch.float64)


def test_recovery_is_one_minus_the_ratio_of_means():
    assert recovered(LOST[0], WITHOUT).mean == pytest.approx(1 - 0.8 / 2.0)
    nothing = recovered(LOST[1], WITHOUT)
    assert (nothing.mean, nothing.ci95) == (0, (0, 0))
    assert recovered(LOST[2], WITHOUT).mean < 0
    value = recovered(LOST[0], WITHOUT)
    assert value.ci95[0] < value.mean < value.ci95[1]
    assert value.mean - value.ci95[0] == pytest.approx(value.ci95[1] - value.mean)
    with pytest.raises(NotFiniteError):
        recovered(LOST[0], torch.zeros(4))


def test_the_delta_method_and_the_bootstrap_agree_on_many_prompts():
    generator = torch.Generator().manual_seed(0)
    without = 0.3 + 0.4 * torch.rand(400, generator=generator, dtype=torch.float64)
    lost = without * (0.2 + 0.4 * torch.rand(400, generator=generator, dtype=torch.float64))
    by_delta = recovered(lost, without).ci95
    (by_bootstrap,) = recovered_bootstrap(lost.unsqueeze(0), without)
    assert by_delta[0] == pytest.approx(by_bootstrap[0], abs=0.004)
    assert by_delta[1] == pytest.approx(by_bootstrap[1], abs=0.004)


def test_equal_prompts_count_once():
    identities = torch.tensor([1, 2, 3, 3])
    assert recovered(LOST[0], WITHOUT, identities).n == 3


def test_effective_layers_count_those_that_recover():
    whole = torch.ones(4, dtype=torch.float64)
    lost = torch.ones(5, 4, dtype=torch.float64)
    lost[2] = 0.5
    assert effective_layers(lost, whole).mean == pytest.approx(1)
    assert effective_layers(torch.full((5, 4), 0.5, dtype=torch.float64), whole).mean == pytest.approx(5)
    lost[4] = 2.0  # harm is no recovery
    assert effective_layers(lost, whole).mean == pytest.approx(1)
    assert effective_layers(lost, whole).n == 4


def test_correlations_of_ranks_and_of_values():
    generator = torch.Generator().manual_seed(0)
    base = torch.linspace(0, 1, 6, dtype=torch.float64).unsqueeze(1)
    first = base + 0.01 * torch.rand(6, 20, generator=generator, dtype=torch.float64)
    assert rank_correlation(first, first.exp()).value == pytest.approx(1)
    assert linear_correlation(first, 3 * first + 1).value == pytest.approx(1)
    grown = (5 * first).exp()
    expected = torch.corrcoef(torch.stack([first.mean(dim=1), grown.mean(dim=1)]))[0, 1]
    assert linear_correlation(first, grown).value == pytest.approx(float(expected))
