"""Penalties that make masks sparse."""

import math

from torch import nn

from oa_train.errors import ConfigurationError
from oa_train.masks.base import MaskDistribution
from oa_train.shapes import Float, Tensor


class SizePenalty(nn.Module):
    """The expected number of kept entries times a weight.

    Args:
        weight: price of one kept entry, in nats; keeping it must lower the KL divergence by more than that.

    Raises:
        ConfigurationError: the weight is negative or not finite.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigurationError(f"penalty is {weight}; expected a price in nats for each kept entry, at least 0.")
        self.weight = weight

    def forward(self, distribution: MaskDistribution) -> Float[Tensor, ""]:
        """The penalty in nats, with gradients to the distribution."""
        return self.weight * distribution.expected_size()
