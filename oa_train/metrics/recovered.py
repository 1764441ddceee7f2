"""Recovered share in causal tracing, and how sharply recovery is localised over layers."""

import numpy as np

from oa_train.metrics.estimates import (
    Estimate,
    Identities,
    bootstrapped,
    of_distinct,
    percentile_interval,
    ratio_of_means,
    resampled_means,
)
from oa_train.shapes import Float, Tensor


def recovered(
    lost: Float[Tensor, " prompt"], lost_without: Float[Tensor, " prompt"], identities: Identities = None
) -> Estimate:
    """Recovered share of the lost probability: the average indirect effect of Li & Janson (2024).

    1 - mean(lost) / mean(lost_without), with a delta-method interval, from the drops in the probability of each
    prompt's answer with something restored and with nothing restored. Negative if restoring does further harm.

    Raises:
        NotFiniteError: the mean drop with nothing restored is 0.
    """
    ratio = ratio_of_means(lost, lost_without, identities)
    low, high = ratio.ci95
    return Estimate(1 - ratio.mean, ratio.stderr, (1 - high, 1 - low), ratio.n)


def recovered_bootstrap(
    lost: Float[Tensor, "run prompt"], lost_without: Float[Tensor, " prompt"], identities: Identities = None
) -> list[tuple[float, float]]:
    """95 % bootstrap percentile interval of `recovered` over prompts, for each run."""
    shares = _resampled_shares(of_distinct(lost, identities), lost_without, identities)
    return [percentile_interval(of_run) for of_run in shares]


def effective_layers(
    lost: Float[Tensor, "layer prompt"], lost_without: Float[Tensor, " prompt"], identities: Identities = None
) -> Estimate:
    """Number of layers over which recovery is spread: the participation ratio (sum x)^2 / sum x^2 of its profile.

    1 if a single layer recovers anything, the number of layers if all recover equally; negative shares count as 0. The
    interval is a bootstrap percentile interval over prompts.
    """
    distinct = of_distinct(lost, identities)
    shares = _resampled_shares(distinct, lost_without, identities).clip(min=0)
    squares = np.maximum((shares**2).sum(axis=0), np.finfo(float).tiny)
    return bootstrapped(shares.sum(axis=0) ** 2 / squares, distinct.shape[1])


def _resampled_shares(distinct: Tensor, lost_without: Tensor, identities: Identities) -> Float[np.ndarray, "run draw"]:
    drop_without, drop = resampled_means(of_distinct(lost_without.unsqueeze(0), identities), distinct)
    shares: np.ndarray = 1 - drop / np.maximum(drop_without, np.finfo(float).tiny)
    return shares
