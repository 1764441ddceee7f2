"""Summary statistics of a curve over the ablated fraction: areas, and the fraction at which it breaks.

Intervals are percentiles over resampled prompts, the same prompts at every point.
"""

import numpy as np

from oa_train.metrics.estimates import Estimate, of_distinct
from oa_train.metrics.ranks import resampled_means
from oa_train.shapes import Float, Int, Tensor

Identities = Int[Tensor, " prompt"] | None


def area(
    fractions: Float[Tensor, " point"], values: Float[Tensor, "point prompt"], identities: Identities = None
) -> Estimate:
    """Area under the mean of the prompts' curves, by the trapezoidal rule.

    Args:
        fractions: ablated fraction at each point, ascending.
        values: value of each prompt at each point.
        identities: see `estimates.estimate`.
    """
    means = _means(values, identities)
    return _bootstrapped(np.trapezoid(means, fractions.double().numpy(), axis=0), values, identities)


def recovery_area(
    fractions: Float[Tensor, " point"], values: Float[Tensor, "point prompt"], identities: Identities = None
) -> Estimate | None:
    """Area under the recovery of a measure, which is 1 at the first point and 0 at the last.

    Recovery at a point is (m - m_last) / (m_first - m_last) with m the mean over prompts; the first point is the clean
    model and the last has everything ablated. It is the normalised faithfulness of Hanna et al. (2024), here averaged
    over sizes as in MIB (Mueller et al., 2025).

    Returns:
        None if there is nothing to recover: in some bootstrap sample the measure is not larger at the first point than
        at the last.
    """
    means = _means(values, identities)
    gaps = means[0] - means[-1]
    if not gaps.min() > 0:
        return None
    shares = (means - means[-1]) / gaps
    return _bootstrapped(np.trapezoid(shares, fractions.double().numpy(), axis=0), values, identities)


def holds_until(
    fractions: Float[Tensor, " point"],
    rise: Float[Tensor, "point prompt"],
    bound: float,
    identities: Identities = None,
) -> Estimate:
    """The last fraction before the mean rise first exceeds a bound: where the curve breaks.

    Args:
        fractions: ablated fraction at each point, ascending.
        rise: increase of a measure for each prompt at each point; the first point counts as within the bound.
        bound: threshold in the unit of `rise`.
        identities: see `estimates.estimate`.
    """
    exceeds = _means(rise, identities)[1:] > bound
    last = np.where(exceeds.any(axis=0), exceeds.argmax(axis=0), len(exceeds))
    return _bootstrapped(fractions.double().numpy()[last], rise, identities)


def _means(values: Tensor, identities: Identities) -> Float[np.ndarray, "point draw"]:
    """Means over all prompts (first column), then over each bootstrap sample."""
    return resampled_means(0, of_distinct(values, identities))[0]


def _bootstrapped(statistics: np.ndarray, values: Tensor, identities: Identities) -> Estimate:
    low, high = np.percentile(statistics[1:], [2.5, 97.5])
    n_distinct = values.shape[1] if identities is None else len(identities.unique())
    return Estimate(float(statistics[0]), float(statistics[1:].std()), (float(low), float(high)), n_distinct)
