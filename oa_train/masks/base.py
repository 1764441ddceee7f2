"""What every distribution over masks offers.

A mask entry is 1 where the component (or edge) is kept and 0 where it is ablated; between the two the value and its
replacement are mixed. A distribution knows how many entries there are and nothing of what they stand for.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from oa_train.errors import ConfigurationError
from oa_train.shapes import Bool, Float, Tensor


class MaskDistribution(nn.Module):
    """A trainable distribution over masks of independent entries.

    Attributes:
        logits: one parameter an entry; the larger, the likelier that the entry is kept.
    """

    def __init__(self, n_entries: int, initial_logit: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((n_entries,), float(initial_logit)))

    @abstractmethod
    def sample(self, n_rows: int, generator: torch.Generator) -> Float[Tensor, "row entry"]:
        """Draw independent masks that carry gradients to the parameters.

        Args:
            n_rows: number of masks.
            generator: the only source of randomness; on the device of the parameters.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and settings as plain values, for checkpoints."""

    @abstractmethod
    def keep_probability(self) -> Float[Tensor, " entry"]:
        """How likely each entry is kept; what the threshold is compared with."""

    @abstractmethod
    def expected_size(self) -> Float[Tensor, ""]:
        """Expected number of kept entries, with gradients: what the size penalty is laid on."""

    @torch.no_grad()
    def threshold(self, level: float) -> Bool[Tensor, " entry"]:
        """The discrete mask: entries whose keep-probability exceeds `level`."""
        return self.keep_probability() > level


def check_threshold(level: float) -> float:
    """Check that a threshold is a probability strictly between 0 and 1.

    Raises:
        ConfigurationError: it is not.
    """
    if not 0.0 < level < 1.0:
        raise ConfigurationError(
            f"threshold is {level}; expected a keep-probability between 0 and 1 (both excluded), for instance 0.5."
        )
    return level
