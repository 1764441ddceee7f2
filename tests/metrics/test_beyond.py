"""Which figures are larger than a threshold in size."""

import numpy as np
import pytest
import torch
from scipy import stats

from oa_train.metrics.estimates import Estimate, estimate
from oa_train.metrics.ranks import beyond


def test_without_a_threshold_it_is_the_two_sided_t_test():
    values = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3
    estimates = [estimate(row) for row in values]
    p_values = stats.ttest_1samp(values.numpy(), 0.0, axis=1).pvalue
    significant, adjusted = beyond(estimates, 0.0, 0.1)
    np.testing.assert_allclose(adjusted, stats.false_discovery_control(p_values), rtol=1e-9)
    np.testing.assert_array_equal(significant, adjusted <= 0.1)


def test_either_side_counts_and_the_threshold_is_left_out():
    values = [Estimate(mean, 0.01, (mean - 0.02, mean + 0.02), 30) for mean in (0.5, -0.5, 0.09, -0.09)]
    significant, adjusted = beyond(values, 0.1)
    assert significant.tolist() == [True, True, False, False]
    assert adjusted[0] == pytest.approx(adjusted[1])
    assert adjusted.max() <= 1


def test_the_same_on_every_prompt_is_decided_by_its_size():
    exact = [Estimate(mean, 0.0, (mean, mean), 8) for mean in (0.2, -0.2, 0.05, 0.1)]
    assert beyond(exact, 0.1)[0].tolist() == [True, True, False, False]
