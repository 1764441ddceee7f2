"""Means with their uncertainty, paired differences, bootstrap resampling, and number formatting."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from oa_train.errors import NotFiniteError, TaskError
from oa_train.shapes import Float, Int, Tensor

# Numbers below this are written in scientific notation.
SMALLEST_WRITTEN = 1e-4

# Intervals narrower than this share of the mean are float32 rounding errors and are not written.
NARROWEST_WRITTEN = 1e-6

# Number of bootstrap samples of the prompts.
N_DRAWS = 1000

# An id for each prompt, the same for equal prompts; None if all are distinct.
Identities = Int[Tensor, " prompt"] | None


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` distinct prompts, its standard error, and its 95 % interval.

    The interval is from Student's t distribution; for a proportion of prompts it is Wilson's score interval, which
    stays inside [0, 1] and has a width even at 12 of 12.
    """

    mean: float
    stderr: float
    ci95: tuple[float, float]
    n: int

    def __str__(self) -> str:
        """Mean and half-width of the interval, "0.0235 ± 0.0030"; ends if it is asymmetric: "0.75 [0.47, 0.91]"."""
        low, high = self.ci95
        margin = (high - low) / 2
        if not margin > NARROWEST_WRITTEN * abs(self.mean):
            return written(self.mean)
        digits = 1 - math.floor(math.log10(margin))
        if not math.isclose(self.mean - low, high - self.mean, abs_tol=1e-9, rel_tol=1e-6):
            shown = [_fixed(value, max(0, digits)) for value in (self.mean, low, high)]
            return f"{shown[0]} [{shown[1]}, {shown[2]}]"
        largest = max(abs(self.mean), margin)
        if largest < SMALLEST_WRITTEN:
            exponent = math.floor(math.log10(largest))
            factor = 10.0**-exponent
            decimals = max(0, digits + exponent)
            return f"({_fixed(self.mean * factor, decimals)} ± {margin * factor:.{decimals}f})e{exponent}"
        return f"{_fixed(self.mean, max(0, digits))} ± {_fixed(margin, max(0, digits))}"

    def as_json(self) -> dict[str, Any]:
        """The metric object of a results file."""
        return {"mean": self.mean, "stderr": self.stderr, "ci95": list(self.ci95), "n": self.n}


def estimate(values: Float[Tensor, " prompt"], identities: Identities = None, *, is_share: bool = False) -> Estimate:
    """Mean of a measure over at least two distinct prompts.

    Args:
        values: value of each prompt.
        identities: an id for each prompt, the same for equal prompts; their values are averaged first, since a
            repetition adds no information. By default all prompts are distinct.
        is_share: whether the measure is a proportion, like accuracy. If so, and every value is 0 or 1, the interval
            is Wilson's.

    Raises:
        NotFiniteError: the mean or its standard error is not finite.
        TaskError: there are fewer than two distinct prompts.
    """
    array = of_distinct(values.unsqueeze(0), identities).squeeze(0).numpy()
    if len(array) < 2:
        raise TaskError(
            f"The {len(values)} prompts of an evaluation are all the same, so their mean has no interval. Give the "
            "task at least two distinct prompts."
        )
    mean, stderr = float(np.mean(array)), float(stats.sem(array))
    if is_share and np.isin(array, (0, 1)).all():
        wilson = stats.binomtest(int(array.sum()), len(array)).proportion_ci(method="wilson")
        return Estimate(mean, stderr, (float(wilson.low), float(wilson.high)), len(array))
    margin = stderr * float(stats.t.ppf(0.975, len(array) - 1))
    if not math.isfinite(margin):
        raise NotFiniteError(f"A mean over {len(array)} prompts and its error are not finite: {mean} ± {margin}.")
    return Estimate(mean, stderr, (mean - margin, mean + margin), len(array))


def of_distinct(values: Float[Tensor, "row prompt"], identities: Identities) -> Float[Tensor, "row distinct"]:
    """Values of the distinct prompts in float64, averaged over equal prompts; see `estimate`."""
    values = values.double()
    if identities is None:
        return values
    distinct, groups, counts = identities.unique(return_inverse=True, return_counts=True)
    if len(distinct) == len(identities):
        return values
    averaged: Tensor = values.new_zeros(len(values), len(distinct)).index_add_(1, groups, values) / counts
    return averaged


def paired_difference(
    first: Float[Tensor, " prompt"], second: Float[Tensor, " prompt"], identities: Identities = None
) -> Estimate:
    """Mean of `first - second` over the same prompts.

    Prompts differ far more in difficulty than ablations differ on one prompt, so the interval of the difference is
    much narrower than the intervals of the two means suggest.
    """
    return estimate(first.double() - second.double(), identities)


def ratio_of_means(
    numerator: Float[Tensor, " prompt"], denominator: Float[Tensor, " prompt"], identities: Identities = None
) -> Estimate:
    """Mean of the numerator divided by the mean of the denominator, over the same prompts.

    Its standard error is that of the linearised ratio (the delta method), from the residuals
    numerator - ratio * denominator.

    Raises:
        NotFiniteError: the denominator's mean is 0.
    """
    below = estimate(denominator, identities).mean
    if below == 0:
        raise NotFiniteError(f"A ratio over {len(denominator)} prompts has the denominator 0.")
    ratio = estimate(numerator, identities).mean / below
    return estimate(ratio + (numerator.double() - ratio * denominator.double()) / below, identities)


def resampled_means(*effects: Tensor) -> list[np.ndarray]:
    """Mean effects [part, 1 + draw]: over all prompts, then over prompts drawn with replacement, the same for each."""
    n_prompts = effects[0].shape[1]
    draws = np.random.default_rng(0).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=N_DRAWS)
    weights = np.concatenate([np.ones((1, n_prompts)), draws]) / n_prompts
    return [values.double().numpy() @ weights.T for values in effects]


def percentile_interval(statistics: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """95 % interval of a statistic, from its values over all prompts (first) and over each bootstrap sample."""
    low, high = np.percentile(statistics[1:], [2.5, 97.5])
    return float(low), float(high)


def bootstrapped(statistics: Float[np.ndarray, " draw"], n_prompts: int) -> Estimate:
    """A statistic over all prompts (first), with error and interval from its values over each bootstrap sample."""
    return Estimate(float(statistics[0]), float(statistics[1:].std()), percentile_interval(statistics), n_prompts)


def written(value: float, digits: int = 3) -> str:
    """A number to `digits` significant digits, integers in full: "0.0235", "1,240"; scientific below 0.0001."""
    if value == 0 or not math.isfinite(value):
        return f"{abs(value):g}" if value == 0 else f"{value}"
    if abs(value) < SMALLEST_WRITTEN:
        return f"{value:.{digits}g}"
    return _fixed(value, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def _fixed(value: float, decimals: int) -> str:
    """A number with `decimals` decimal places and no negative zero."""
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"
