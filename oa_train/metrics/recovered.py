"""Recovered share in causal tracing, and how sharply recovery is localised over layers."""

from collections.abc import Sequence

import numpy as np

from oa_train.metrics.estimates import Estimate, of_distinct, ratio_of_means
from oa_train.metrics.ranks import resampled_means
from oa_train.shapes import Float, Int, Tensor

Identities = Int[Tensor, " prompt"] | None


def recovered(
    lost: Float[Tensor, " prompt"], lost_without: Float[Tensor, " prompt"], identities: Identities = None
) -> Estimate:
    """Recovered share of the lost probability: the average indirect effect of Li & Janson (2024).

    1 - mean(lost) / mean(lost_without), with a delta-method interval. Negative if restoring does further harm.

    Args:
        lost: drop in the probability of each prompt's answer with something restored.
        lost_without: the same drop with nothing restored.
        identities: see `estimates.estimate`.

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
    shares = _resampled_shares(lost, lost_without, identities)
    return [(float(low), float(high)) for low, high in np.percentile(shares[:, 1:], [2.5, 97.5], axis=1).T]


def effective_layers(
    lost: Float[Tensor, "layer prompt"], lost_without: Float[Tensor, " prompt"], identities: Identities = None
) -> Estimate:
    """Number of layers over which recovery is spread: the participation ratio (sum x)^2 / sum x^2 of its profile.

    1 if a single layer recovers anything, the number of layers if all recover equally; negative shares count as 0. The
    interval is a bootstrap percentile interval over prompts.
    """
    shares = _resampled_shares(lost, lost_without, identities).clip(min=0)
    squares = np.maximum((shares**2).sum(axis=0), np.finfo(float).tiny)
    spread = shares.sum(axis=0) ** 2 / squares
    low, high = np.percentile(spread[1:], [2.5, 97.5])
    return Estimate(
        float(spread[0]), float(spread[1:].std()), (float(low), float(high)), len(_distinct(identities, lost))
    )


def _resampled_shares(lost: Tensor, lost_without: Tensor, identities: Identities) -> Float[np.ndarray, "run draw"]:
    below, above = resampled_means(
        0, of_distinct(lost_without.unsqueeze(0), identities), of_distinct(lost, identities)
    )
    shares: np.ndarray = 1 - above / np.maximum(below, np.finfo(float).tiny)
    return shares


def _distinct(identities: Identities, lost: Tensor) -> Sequence[int]:
    return range(lost.shape[1]) if identities is None else identities.unique().tolist()
