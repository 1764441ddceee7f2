"""Comparisons of effects over many parts: rank correlations, ratios, and which effects exceed a threshold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from oa_train.metrics.estimates import Estimate, percentile_interval, resampled_means
from oa_train.shapes import Bool, Float, Tensor

# Lower bound of the KL divergences in a ratio, in nats: float32 cannot distinguish smaller ones from 0.
FLOOR = 1e-6


@dataclass(frozen=True)
class Bootstrapped:
    """A statistic over all prompts, and its 95 % bootstrap percentile interval over prompts."""

    value: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        """Value and interval: "0.91 (0.88 to 0.93)"."""
        return f"{self.value:.3g} ({self.ci95[0]:.3g} to {self.ci95[1]:.3g})"

    def as_json(self) -> dict[str, Any]:
        """The statistic as written to a results file."""
        return {"value": self.value, "ci95": list(self.ci95)}


def rank_correlation(first: Float[Tensor, "part prompt"], second: Float[Tensor, "part prompt"]) -> Bootstrapped:
    """Spearman's rank correlation over parts of two ablations' mean effects, measured on the same prompts.

    The interval comes from resampling prompts, not parts.
    """
    return _correlated(*(stats.rankdata(means, axis=0) for means in resampled_means(first, second)))


def linear_correlation(first: Float[Tensor, "part prompt"], second: Float[Tensor, "part prompt"]) -> Bootstrapped:
    """Pearson's correlation over parts of two ablations' mean effects; see `rank_correlation`."""
    return _correlated(*resampled_means(first, second))


def _correlated(first: np.ndarray, second: np.ndarray) -> Bootstrapped:
    """Correlation over parts, for all prompts and for each bootstrap sample of them."""
    centred = [values - values.mean(axis=0) for values in (first, second)]
    norms = np.sqrt((centred[0] ** 2).sum(axis=0) * (centred[1] ** 2).sum(axis=0))
    return _bootstrapped((centred[0] * centred[1]).sum(axis=0) / np.maximum(norms, np.finfo(float).tiny))


def median_ratio(first: Float[Tensor, "part prompt"], second: Float[Tensor, "part prompt"]) -> Bootstrapped:
    """Median over parts of the ratio of two ablations' mean effects, measured on the same prompts."""
    return _bootstrapped(np.median(_ratios(first, second), axis=0))


def mean_ratio(first: Float[Tensor, "part prompt"], second: Float[Tensor, "part prompt"]) -> Bootstrapped:
    """Mean over parts of the ratio of two ablations' mean effects, each clipped at 1 as in Li & Janson (2024)."""
    return _bootstrapped(_ratios(first, second).clip(max=1).mean(axis=0))


def above(
    effects: Float[Tensor, "part prompt"], threshold: float, false_discovery_rate: float = 0.05
) -> tuple[Bool[np.ndarray, " part"], Float[np.ndarray, " part"]]:
    """Parts whose mean effect exceeds a threshold, and their adjusted p-values.

    Each part gets a one-sided t-test over prompts; p-values are adjusted for the false discovery rate (Benjamini and
    Hochberg).
    """
    values = effects.double().numpy() - threshold
    p_values = _one_sided(values.mean(axis=1), stats.sem(values, axis=1), values.shape[1] - 1)
    return _discoveries(p_values, false_discovery_rate)


def beyond(
    estimates: Sequence[Estimate], threshold: float, false_discovery_rate: float = 0.05
) -> tuple[Bool[np.ndarray, " part"], Float[np.ndarray, " part"]]:
    """Estimates whose absolute value exceeds a threshold, and their adjusted p-values.

    The p-value is twice that of a one-sided t-test on the side of the mean, adjusted as in `above`. With a threshold
    of 0 this is the usual two-sided test.
    """
    excess = np.array([abs(value.mean) - threshold for value in estimates])
    errors = np.array([value.stderr for value in estimates])
    p_values = _one_sided(excess, errors, np.array([value.n - 1 for value in estimates]))
    return _discoveries(np.minimum(1.0, 2 * p_values), false_discovery_rate)


def _one_sided(means: np.ndarray, errors: np.ndarray, degrees: int | np.ndarray) -> np.ndarray:
    """P-values of one-sided t-tests; where the standard error is 0, the sign of the mean decides."""
    scores = np.divide(means, errors, out=np.copysign(np.inf, means), where=errors > 0)
    return np.where(means == 0, 1.0, stats.t.sf(scores, degrees))


def _discoveries(p_values: np.ndarray, false_discovery_rate: float) -> tuple[np.ndarray, np.ndarray]:
    adjusted = stats.false_discovery_control(p_values)
    return adjusted <= false_discovery_rate, adjusted


def _ratios(first: Tensor, second: Tensor) -> np.ndarray:
    means = resampled_means(first, second)
    ratios: np.ndarray = np.maximum(means[0], FLOOR) / np.maximum(means[1], FLOOR)
    return ratios


def _bootstrapped(statistics: np.ndarray) -> Bootstrapped:
    return Bootstrapped(float(statistics[0]), percentile_interval(statistics))
