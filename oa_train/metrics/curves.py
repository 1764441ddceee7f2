"""Summary statistics of a curve over the ablated fraction: areas, and the fraction at which it breaks.

Intervals are percentiles over resampled prompts, the same prompts at every point. For `identities` see
`estimates.estimate`.
"""

import numpy as np

from oa_train.metrics.estimates import Estimate, Identities, bootstrapped, of_distinct, resampled_means
from oa_train.shapes import Float, Tensor


def area(
    fractions: Float[Tensor, " point"], values: Float[Tensor, "point prompt"], identities: Identities = None
) -> Estimate:
    """Area under the mean of the prompts' curves, by the trapezoidal rule; `fractions` is ascending."""
    distinct = of_distinct(values, identities)
    (means,) = resampled_means(distinct)
    return bootstrapped(np.trapezoid(means, fractions.double().numpy(), axis=0), distinct.shape[1])


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
    distinct = of_distinct(values, identities)
    (means,) = resampled_means(distinct)
    gaps = means[0] - means[-1]
    if not gaps.min() > 0:
        return None
    shares = (means - means[-1]) / gaps
    return bootstrapped(np.trapezoid(shares, fractions.double().numpy(), axis=0), distinct.shape[1])


def holds_until(
    fractions: Float[Tensor, " point"],
    rise: Float[Tensor, "point prompt"],
    bound: float,
    identities: Identities = None,
) -> Estimate:
    """The last fraction before the mean rise of a measure first exceeds a bound: where the curve breaks.

    The first point counts as within the bound, which is in the unit of `rise`; `fractions` is ascending.
    """
    distinct = of_distinct(rise, identities)
    (means,) = resampled_means(distinct)
    exceeds = means[1:] > bound
    last = np.where(exceeds.any(axis=0), exceeds.argmax(axis=0), len(exceeds))
    return bootstrapped(fractions.double().numpy()[last], distinct.shape[1])
