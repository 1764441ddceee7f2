"""Hard concrete masks: a stretched sigmoid of logistic noise, cut off at 0 and 1.

Louizos, Welling & Kingma, Learning sparse neural networks through L0 regularization (ICLR 2018). The samples are
differentiable in the parameters wherever they lie strictly between 0 and 1, and are exactly 0 and exactly 1 with
positive probability.
"""

import math
from typing import Any

import torch
from torch.nn import functional as F

from oa_train.errors import ConfigurationError
from oa_train.masks.base import MaskDistribution
from oa_train.shapes import Float, Tensor


class HardConcrete(MaskDistribution):
    """Hard concrete distribution over independent mask entries.

    With logistic noise e, an entry is sigmoid((e + logit) / temperature), stretched linearly from (0, 1) to
    (lower, upper) and clamped to [0, 1].

    Args:
        n_entries: number of mask entries.
        initial_logit: start of every logit; with the other defaults 2 keeps entries with probability 0.97.
        temperature: the lower, the more samples are exactly 0 or 1; positive.
        lower: lower end of the stretch, below 0.
        upper: upper end of the stretch, above 1.

    Raises:
        ConfigurationError: an argument is out of its range.
    """

    def __init__(
        self,
        n_entries: int,
        *,
        initial_logit: float = 2.0,
        temperature: float = 2 / 3,
        lower: float = -0.1,
        upper: float = 1.1,
    ) -> None:
        super().__init__(n_entries, initial_logit)
        if not temperature > 0:
            raise ConfigurationError(f"temperature is {temperature}; expected more than 0.")
        if not (lower < 0 and upper > 1):
            raise ConfigurationError(f"The stretch is ({lower}, {upper}); expected an end below 0 and one above 1.")
        self.temperature = temperature
        self.lower = lower
        self.upper = upper

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain values, for checkpoints."""
        return {
            "class": type(self).__name__,
            "temperature": self.temperature,
            "lower": self.lower,
            "upper": self.upper,
        }

    def keep_probability(self) -> Float[Tensor, " entry"]:
        """Probability that a sample is not exactly 0."""
        return torch.sigmoid(self.logits - self.temperature * math.log(-self.lower / self.upper))

    def expected_size(self) -> Float[Tensor, ""]:
        """Expected number of entries that are not exactly 0, the L0 penalty of the paper."""
        return self.keep_probability().sum()

    def sample(self, n_rows: int, generator: torch.Generator) -> Float[Tensor, "row entry"]:
        """Draw masks; gradients flow where a sample lies strictly between 0 and 1."""
        logits = self.logits
        uniform = torch.rand(n_rows, len(logits), generator=generator, device=logits.device, dtype=logits.dtype)
        # The generator can return exactly 0, whose logit is infinite; the nearest number above it is not.
        noise = torch.logit(uniform.clamp(min=torch.finfo(uniform.dtype).tiny))
        soft = torch.sigmoid((noise + logits) / self.temperature)
        return F.hardtanh(soft * (self.upper - self.lower) + self.lower, 0.0, 1.0)
