"""Distributions over masks, and the averaging of gradients over the rows that carry them.

A distribution knows the number of entries of a mask, but not their meaning.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from oa_train.errors import ConfigurationError
from oa_train.shapes import Bool, Float, Int, Tensor


class MaskDistribution(nn.Module):
    """A trainable distribution over masks of independent entries.

    Attributes:
        logits: one parameter per entry; the larger it is, the more probably the entry is kept.
    """

    def __init__(self, n_entries: int, initial_logit: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((n_entries,), float(initial_logit)))

    @abstractmethod
    def sample(self, uniform: Float[Tensor, "row entry"]) -> Float[Tensor, "row entry"]:
        """Map independent uniform draws from [0, 1), the only source of randomness, to masks with gradients."""

    def carries_gradient(self, mask: Float[Tensor, "row entry"]) -> Bool[Tensor, "row entry"] | None:
        """Samples over which each entry's gradient is averaged; None if gradients are summed over all rows.

        `mask` holds samples, with entries that have no effect already set to 0.
        """
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and settings of the distribution as plain values, for checkpoints."""

    @abstractmethod
    def keep_probability(self) -> Float[Tensor, " entry"]:
        """Probability that each entry is kept, with gradients; penalties and the threshold apply to it."""

    @torch.no_grad()
    def threshold(self, level: float) -> Bool[Tensor, " entry"]:
        """The discrete mask: entries whose keep-probability exceeds `level`."""
        return self.keep_probability() > level


def averaged_gradient(
    mask: Float[Tensor, "row entry"], counts: Int[Tensor, " entry"], n_rows: int
) -> Float[Tensor, "row entry"]:
    """The same masks, with each entry's gradient averaged over the rows that carry one.

    The loss is a mean over all `n_rows` of an optimiser step, of which `counts` carry gradient to an entry: the factor
    n_rows / counts turns that into a mean over these rows.
    """
    weight = (n_rows / counts.clamp(min=1)).to(mask.dtype)
    # The difference is zero, so the value is unchanged and its gradient is scaled by the weight.
    return mask.detach() + weight * (mask - mask.detach())


def check_threshold(level: float) -> None:
    """Raise `ConfigurationError` unless the threshold is strictly between 0 and 1."""
    if not 0.0 < level < 1.0:
        raise ConfigurationError(
            f"threshold is {level}; expected a keep-probability between 0 and 1 (both excluded), for instance 0.5."
        )
