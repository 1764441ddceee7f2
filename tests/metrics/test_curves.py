"""Areas under curves and where they break, against literal loops."""

import numpy as np
import pytest
import torch

from oa_train.metrics.curves import area, holds_until, recovery_area
from oa_train.metrics.estimates import N_DRAWS

FRACTIONS = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=torch.float64)


def some_values(n_prompts: int = 9) -> torch.Tensor:
    return torch.rand(4, n_prompts, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def draws(n_prompts: int) -> np.ndarray:
    return np.random.default_rng(0).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=N_DRAWS)


def by_hand(curve: list[float]) -> float:
    total = 0.0
    for n in range(3):
        total += float(FRACTIONS[n + 1] - FRACTIONS[n]) * (curve[n] + curve[n + 1]) / 2
    return total


def test_an_area_is_the_sum_of_its_trapezoids():
    values = some_values()
    result = area(FRACTIONS, values)
    assert result.mean == pytest.approx(by_hand(values.mean(dim=1).tolist()), rel=1e-12)
    resampled = [
        by_hand([sum(w * v for w, v in zip(d, row, strict=True)) / 9 for row in values.tolist()]) for d in draws(9)
    ]
    assert result.ci95 == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])), rel=1e-9)
    assert result.stderr == pytest.approx(np.std(resampled), rel=1e-9)
    assert result.n == 9


def test_recovery_is_one_at_the_first_point_and_zero_at_the_last():
    values = some_values() + torch.tensor([[9.0], [6.0], [4.0], [1.0]])
    means = values.mean(dim=1).tolist()
    shares = [(mean - means[-1]) / (means[0] - means[-1]) for mean in means]
    result = recovery_area(FRACTIONS, values)
    assert result is not None
    assert result.mean == pytest.approx(by_hand(shares), rel=1e-12)
    assert recovery_area(FRACTIONS, values.flip(0)) is None


def test_a_curve_holds_until_it_first_exceeds_the_bound():
    rise = torch.tensor([[0.0, 0.0], [0.1, 0.3], [0.6, 0.6], [0.0, 0.0]])
    assert holds_until(FRACTIONS, rise, 0.25).mean == 0.1
    assert holds_until(FRACTIONS, rise, 0.1).mean == 0.0
    assert holds_until(FRACTIONS, rise, 0.7).mean == 1.0
    # Of two prompts, drawn with replacement, the second is drawn twice in a quarter of the cases.
    assert holds_until(FRACTIONS, rise, 0.25).ci95 == (0.0, 0.1)


def test_repeated_prompts_count_once():
    values, identities = some_values(3), torch.tensor([0, 1, 2, 2, 2])
    repeated = values[:, [0, 1, 2, 2, 2]]
    assert area(FRACTIONS, repeated, identities) == area(FRACTIONS, values)
    assert area(FRACTIONS, repeated).mean != area(FRACTIONS, values).mean
