"""Means with their uncertainty against the formulas of a textbook."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from oa_train.errors import NotFiniteError, TaskError
from oa_train.metrics.estimates import Estimate, estimate, paired_difference, written

# Student's t at 0.975 with two degrees of freedom, from its closed form (2p - 1) / sqrt(2 p (1 - p)).
T_OF_TWO = (2 * 0.975 - 1) / math.sqrt(2 * 0.975 * 0.025)


def test_three_values_by_hand():
    found = estimate(torch.tensor([1.0, 2.0, 6.0]))
    stderr = math.sqrt((4 + 1 + 9) / 2 / 3)
    assert found.mean == pytest.approx(3.0, abs=1e-14)
    assert found.stderr == pytest.approx(stderr, rel=1e-14)
    assert found.ci95 == pytest.approx((3 - T_OF_TWO * stderr, 3 + T_OF_TWO * stderr), rel=1e-12)
    assert found.n == 3


def test_interval_equals_a_t_test_of_scipy():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    interval = stats.ttest_1samp(values.double().numpy(), 0.0).confidence_interval(0.95)
    assert estimate(values).ci95 == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_about_95_of_100_intervals_hold_the_mean():
    values = 2 + torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    intervals = [estimate(row).ci95 for row in values]
    share = sum(low < 2 < high for low, high in intervals) / 2000
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_sums_are_taken_in_float64():
    values = torch.full((3000,), 0.1, dtype=torch.float32)
    values[0] = 1e6
    assert estimate(values).mean == pytest.approx(float(np.mean(values.double().numpy())), rel=1e-15)


def test_equal_values_have_no_uncertainty():
    found = estimate(torch.full((4,), 2.5))
    assert (found.mean, found.stderr, found.ci95, found.n) == (2.5, 0.0, (2.5, 2.5), 4)


def test_paired_difference_is_a_paired_t_test():
    generator = torch.Generator().manual_seed(0)
    difficulty = 100 * torch.rand(30, generator=generator)
    first = difficulty + torch.randn(30, generator=generator)
    second = difficulty + torch.randn(30, generator=generator) - 1
    found = paired_difference(first, second)
    interval = stats.ttest_rel(first.double().numpy(), second.double().numpy()).confidence_interval(0.95)
    assert found.ci95 == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert found.mean == pytest.approx(estimate(first).mean - estimate(second).mean, abs=1e-11)
    # Far narrower than the two means suggest.
    assert found.stderr < 0.1 * estimate(first).stderr


def test_json():
    found = estimate(torch.tensor([1.0, 3.0])).as_json()
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == {"mean", "stderr", "ci95", "n"}
    assert found["mean"] == 2.0
    assert found["n"] == 2
    assert found["ci95"][0] < 2.0 < found["ci95"][1]


@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, math.inf]])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_values_that_are_not_finite_have_no_estimate(values):
    with pytest.raises(NotFiniteError, match="finite"):
        estimate(torch.tensor(values))


@pytest.mark.parametrize("times", [1, 5])
def test_repeated_prompts_never_narrow_an_interval(times):
    values, identities = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([7, 8, 9])
    repeated = estimate(values.repeat(times), identities.repeat(times))
    assert repeated == estimate(values)
    assert repeated.n == 3


def test_values_of_a_repeated_prompt_are_averaged_first():
    # The first prompt twice, under two partners.
    assert estimate(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1, 1, 2])) == estimate(torch.tensor([1.0, 5.0]))


def test_one_prompt_has_no_interval():
    with pytest.raises(TaskError, match="The 3 prompts of an evaluation are all the same"):
        estimate(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([4, 4, 4]))


@pytest.mark.parametrize(
    ("mean", "margin", "text"),
    [
        (5.18, 20.2, "5 ± 20"),
        (0.02351, 0.003, "0.0235 ± 0.0030"),
        (1234.5, 321.0, "1,234 ± 321"),
        (-0.0001, 0.02, "0.000 ± 0.020"),
        (0.0, 0.0, "0"),
        (0.25, 0.0, "0.250"),
        (1.2e-6, 3e-7, "(1.20 ± 0.30)e-6"),
    ],
)
def test_an_interval_is_written_as_a_person_would(mean, margin, text):
    assert str(Estimate(mean, margin / 2, (mean - margin, mean + margin), 9)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.02351, "0.0235"),
        (2000.0, "2,000"),
        (12.345, "12.3"),
        (1.5e-5, "1.5e-05"),
        (40, "40.0"),
    ],
)
def test_numbers_are_written_as_a_person_would(value, text):
    assert written(value) == text


@pytest.mark.parametrize(
    ("right", "n", "text"),
    [(12, 12, "1.00 [0.76, 1.00]"), (0, 12, "0.00 [0.00, 0.24]"), (9, 12, "0.75 [0.47, 0.91]")],
)
def test_a_share_of_right_prompts_has_an_honest_interval(right, n, text):
    """Wilson's score by hand: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    p, z = right / n, stats.norm.ppf(0.975)
    middle, margin = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    share = estimate(torch.tensor([1.0] * right + [0.0] * (n - right)), is_share=True)
    expected = [(middle - margin) / (1 + z**2 / n), (middle + margin) / (1 + z**2 / n)]
    assert share.as_json()["ci95"] == pytest.approx(expected, abs=1e-9)
    assert str(share) == text
    # Shares of several positions in a prompt are no longer right or wrong.
    assert estimate(torch.tensor([1.0, 0.5]), is_share=True) == estimate(torch.tensor([1.0, 0.5]))
