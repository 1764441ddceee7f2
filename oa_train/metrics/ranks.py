"""Comparisons of effects over many parts: rank correlations, ratios, and which effects exceed a threshold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from oa_train.metrics.estimates import Estimate
from oa_train.shapes import Bool, Float, Tensor

N_DRAWS = 1000

# Smallest KL divergence in a ratio, in nats: float32 cannot tell smaller ones from 0.
FLOOR = 1e-6


@dataclass(frozen=True)
class Bootstrapped:
    """A statistic of all prompts, and its 95 % percentile interval over resampled prompts."""

    value: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        """Value and interval: "0.91 (0.88 to 0.93)"."""
        return f"{self.value:.3g} ({self.ci95[0]:.3g} to {self.ci95[1]:.3g})"

    def as_json(self) -> dict[str, Any]:
        """The object in a results file."""
        return {"value": self.value, "ci95": list(self.ci95)}


def rank_correlation(
    first: Float[Tensor, "part prompt"], second: Float[Tensor, "part prompt"], seed: int = 0
) -> Bootstrapped:
    """Spearman's correlation of two ablations' mean effects, from their effects on the same prompts.

    The prompts are resampled, the parts are not.
    """
    return _correlated(*(stats.rankdata(means, axis=0) for means in resampled_means(seed, first, second)))


def linear_correlation(
    first: Float[Tensor, "part prompt"], second: Float[Tensor, "part prompt"], seed: int = 0
) -> Bootstrapped:
    """Pearson's correlation of two ablations' mean effects; see `rank_correlation`."""
    return _correlated(*resampled_means(seed, first, second))


def _correlated(first: np.ndarray, second: np.ndarray) -> Bootstrapped:
    """Correlation over parts, in every resampling of the prompts."""
    centred = [values - values.mean(axis=0) for values in (first, second)]
    norms = np.sqrt((centred[0] ** 2).sum(axis=0) * (centred[1] ** 2).sum(axis=0))
    return _bootstrapped((centred[0] * centred[1]).sum(axis=0) / np.maximum(norms, np.finfo(float).tiny))


def median_ratio(
    first: Float[Tensor, "part prompt"], second: Float[Tensor, "part prompt"], seed: int = 0
) -> Bootstrapped:
    """Median over parts of the ratio of two ablations' mean effects, from their effects on the same prompts."""
    return _bootstrapped(np.median(_ratios(first, second, seed), axis=0))


def mean_ratio(
    first: Float[Tensor, "part prompt"], second: Float[Tensor, "part prompt"], seed: int = 0
) -> Bootstrapped:
    """Mean over parts of the ratio of two ablations' mean effects, each clipped at 1 as in Li & Janson (2024)."""
    return _bootstrapped(_ratios(first, second, seed).clip(max=1).mean(axis=0))


def above(
    effects: Float[Tensor, "part prompt"], threshold: float, false_discovery_rate: float = 0.05
) -> tuple[Bool[np.ndarray, " part"], Float[np.ndarray, " part"]]:
    """Parts whose mean effect exceeds a threshold, and their adjusted p-values.

    A one-sided t-test over prompts for each part, with p-values adjusted to the false discovery rate (Benjamini and
    Hochberg).
    """
    values = effects.double().numpy() - threshold
    means, errors = values.mean(axis=1), stats.sem(values, axis=1)
    # A part whose effect is the same on every prompt has no error: its sign decides.
    scores = np.divide(means, errors, out=np.copysign(np.inf, means), where=errors > 0)
    p_values = np.where(means == 0, 1.0, stats.t.sf(scores, values.shape[1] - 1))
    adjusted = stats.false_discovery_control(p_values)
    return adjusted <= false_discovery_rate, adjusted


def beyond(
    estimates: Sequence[Estimate], threshold: float, false_discovery_rate: float = 0.05
) -> tuple[Bool[np.ndarray, " part"], Float[np.ndarray, " part"]]:
    """Estimates whose absolute value exceeds a threshold, and their adjusted p-values.

    Twice the p-value of a one-sided t-test on the side of the mean, adjusted like those of `above`. It is the usual
    two-sided test where the threshold is 0.
    """
    excess = np.array([abs(value.mean) - threshold for value in estimates])
    errors = np.array([value.stderr for value in estimates])
    scores = np.divide(excess, errors, out=np.copysign(np.inf, excess), where=errors > 0)
    degrees = np.array([value.n - 1 for value in estimates])
    p_values = np.where(excess == 0, 1.0, np.minimum(1.0, 2 * stats.t.sf(scores, degrees)))
    adjusted = stats.false_discovery_control(p_values)
    return adjusted <= false_discovery_rate, adjusted


def _ratios(first: Tensor, second: Tensor, seed: int) -> np.ndarray:
    means = resampled_means(seed, first, second)
    ratios: np.ndarray = np.maximum(means[0], FLOOR) / np.maximum(means[1], FLOOR)
    return ratios


def resampled_means(seed: int, *effects: Tensor) -> list[np.ndarray]:
    """Mean effects [part, 1 + draw]: of all prompts, then of prompts drawn with replacement, the same for each."""
    n_prompts = effects[0].shape[1]
    draws = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=N_DRAWS)
    weights = np.concatenate([np.ones((1, n_prompts)), draws]) / n_prompts
    return [values.double().numpy() @ weights.T for values in effects]


def _bootstrapped(statistics: np.ndarray) -> Bootstrapped:
    low, high = np.percentile(statistics[1:], [2.5, 97.5])
    return Bootstrapped(float(statistics[0]), (float(low), float(high)))
