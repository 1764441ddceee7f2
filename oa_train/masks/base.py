"""Distributions over masks, and the average of gradients over the rows that carry them.

A mask entry is 1 where the component (or edge) is kept and 0 where it is ablated; between the two the value and its
replacement are mixed. A distribution knows how many entries there are and nothing of what they stand for.
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
        logits: one parameter per entry; the larger, the likelier that the entry is kept.
    """

    def __init__(self, n_entries: int, initial_logit: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((n_entries,), float(initial_logit)))

    @abstractmethod
    def sample(self, uniform: Float[Tensor, "row entry"]) -> Float[Tensor, "row entry"]:
        """Independent masks that carry gradients to the parameters.

        `uniform` are independent draws from [0, 1), the only source of randomness.
        """

    def carries_gradient(self, mask: Float[Tensor, "row entry"]) -> Bool[Tensor, "row entry"] | None:
        """Samples that an entry's gradient is averaged over; None where it is a plain sum over rows.

        `mask` holds samples, after entries without effect were set to 0.
        """
        return None

    def draw(self, n_rows: int, generator: torch.Generator) -> Float[Tensor, "row entry"]:
        """Draw masks whose gradients are averaged over these rows alone.

        The generator, on the device of the parameters, is the only source of randomness.
        """
        logits = self.logits
        mask = self.sample(
            torch.rand(n_rows, len(logits), generator=generator, device=logits.device, dtype=logits.dtype)
        )
        inside = self.carries_gradient(mask)
        return mask if inside is None else averaged_gradient(mask, inside.sum(dim=0), n_rows)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and settings as plain values, for checkpoints."""

    @abstractmethod
    def keep_probability(self) -> Float[Tensor, " entry"]:
        """Probability that each entry is kept, with gradients; penalties and the threshold are on it."""

    def expected_size(self) -> Float[Tensor, ""]:
        """Expected number of kept entries, with gradients."""
        return self.keep_probability().sum()

    @torch.no_grad()
    def threshold(self, level: float) -> Bool[Tensor, " entry"]:
        """The discrete mask: entries whose keep-probability exceeds `level`."""
        return self.keep_probability() > level


def averaged_gradient(
    mask: Float[Tensor, "row entry"], counts: Int[Tensor, " entry"], n_rows: int
) -> Float[Tensor, "row entry"]:
    """The same masks, with gradients scaled to means over the rows that carry them.

    A loss averages over all rows, and only some of them carry gradient to an entry: weighting these by
    rows / rows that carry it turns their sum into their mean. Both count all that enters one step of the optimiser.
    """
    weight = (n_rows / counts.clamp(min=1)).to(mask.dtype)
    # The difference is zero, so the value is unchanged.
    return mask.detach() + weight * (mask - mask.detach())


def check_threshold(level: float) -> float:
    """Return the threshold; raises `ConfigurationError` unless it is strictly between 0 and 1."""
    if not 0.0 < level < 1.0:
        raise ConfigurationError(
            f"threshold is {level}; expected a keep-probability between 0 and 1 (both excluded), for instance 0.5."
        )
    return level
