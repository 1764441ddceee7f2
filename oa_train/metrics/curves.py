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
    """Area under the mean of the prompts' curves, by trapezoids; `fractions` is ascending."""
    distinct = of_distinct(values, identities)
    (means,) = resampled_means(distinct)
    return bootstrapped(np.trapezoid(means, fractions.double().numpy(), axis=0), distinct.shape[1])


def recovery_area(
    fractions: Float[Tensor, " point"], values: Float[Tensor, "point prompt"], identities: Identities = None
) -> Estimate | None:
    """Area under the recovery of a measure: 1 at the first point, 0 at the last.

    Recovery at a point is (m - m_last) / (m_first - m_last), of means over prompts, with the clean model first and
    everything ablated last: the normalised faithfulness of the literature (Hanna et al., 2024), here averaged over
    sizes as in MIB (Mueller et al., 2025).

    Returns:
        None if in some resampling the measure is not larger at the first point than at the last, so that there is
        nothing to recover.
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

    The first point counts as within the bound, which is in the unit of the rise; `fractions` is ascending.
    """
    distinct = of_distinct(rise, identities)
    (means,) = resampled_means(distinct)
    exceeds = means[1:] > bound
    last = np.where(exceeds.any(axis=0), exceeds.argmax(axis=0), len(exceeds))
    return bootstrapped(fractions.double().numpy()[last], distinct.shape[1])
