import numpy as np
import pytest
import torch
from scipy import stats

from oa_train.metrics.ranks import above, mean_ratio, median_ratio, rank_correlation


def effects(seed: int, n_parts: int = 40, n_prompts: int = 50, noise: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(n_parts, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    return means + noise * torch.randn(n_parts, n_prompts, generator=generator)


def test_rank_correlation_is_scipys_and_its_interval_covers_it() -> None:
    first, second = effects(1), effects(2)
    correlation = rank_correlation(first, second)
    expected = stats.spearmanr(first.mean(1).numpy(), second.mean(1).numpy()).statistic
    assert correlation.value == pytest.approx(expected, abs=1e-6)
    assert correlation.ci95[0] <= correlation.value
    assert correlation.ci95[1] - correlation.ci95[0] > 0
    assert rank_correlation(first, first).value == pytest.approx(1)
    assert rank_correlation(first, -first).value == pytest.approx(-1)
    noisy = rank_correlation(effects(1, noise=3.0), effects(2, noise=3.0))
    assert noisy.ci95[1] - noisy.ci95[0] > correlation.ci95[1] - correlation.ci95[0]


def test_equal_effects_have_no_rank_correlation() -> None:
    assert rank_correlation(torch.zeros(3, 4), effects(0, 3, 4)).value == 0


def test_ratios() -> None:
    first, second = (
        torch.tensor([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]),
        torch.tensor([[2.0, 2.0], [8.0, 8.0], [3.0, 3.0]]),
    )
    assert median_ratio(first, second).value == 0.5
    assert mean_ratio(first, second).value == pytest.approx((0.5 + 0.25 + 1) / 3)


def test_parts_above_a_threshold_are_few_where_there_is_no_effect() -> None:
    wrong = []
    for seed in range(40):
        noise = torch.randn(200, 30, generator=torch.Generator().manual_seed(seed))
        noise[:20] += 2
        flags, adjusted = above(noise, 0.0)
        assert flags[:20].all()
        wrong.append(flags[20:].sum() / flags.sum())
        assert (
            adjusted >= stats.ttest_1samp(noise.double().numpy(), 0, axis=1, alternative="greater").pvalue - 1e-12
        ).all()
    assert np.mean(wrong) <= 0.07  # the rate is 0.045, over 40 draws of about 20 parts


def test_an_effect_without_spread_is_judged_by_its_sign() -> None:
    flags, _ = above(torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]), 0.0)
    assert flags.tolist() == [True, False, False]
