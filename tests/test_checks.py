"""Checks of options name the option, its value and what was expected."""

import math

import pytest

from oa_train.checks import check_at_least, check_choice, check_positive
from oa_train.errors import ConfigurationError

_NEAR = "side is 'rihgt'; expected one of left, right. Did you mean right?"


def test_numbers_that_suit_and_options_that_are_left_out_pass():
    check_at_least(2, n_test=2, n_tokens=None)
    check_positive(rate=0.1, patience=None)
    check_choice("side", "left", ("left", "right"))


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: check_at_least(2, n_means=2, n_test=1), "n_test is 1; expected at least 2."),
        (lambda: check_at_least(0, tolerance=math.nan), "tolerance is nan; expected at least 0."),
        (lambda: check_positive(rate=0), "rate is 0; expected more than 0."),
        (lambda: check_positive(rate=math.nan), "rate is nan; expected more than 0."),
        (lambda: check_choice("side", "rihgt", ("left", "right")), _NEAR),
        (lambda: check_choice("side", "top", ("left", "right")), "side is 'top'; expected one of left, right."),
    ],
)
def test_others_are_refused(check, said):
    with pytest.raises(ConfigurationError) as refused:
        check()
    assert str(refused.value) == said


def test_none_is_no_choice(unchecked):
    with pytest.raises(ConfigurationError, match="side is None; expected one of left, right"):
        check_choice("side", None, ("left", "right"))
