"""Hard concrete masks: a stretched sigmoid of logistic noise, clamped to [0, 1].

Louizos, Welling & Kingma, Learning sparse neural networks through L0 regularization (ICLR 2018). The samples are
differentiable in the parameters wherever they lie strictly between 0 and 1, and are exactly 0 and exactly 1 with
positive probability.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from oa_train.checks import check_choice
from oa_train.errors import ConfigurationError
from oa_train.masks.base import MaskDistribution
from oa_train.shapes import Float, Tensor

HardConcreteForm = Literal["standard", "published"]

# Added to the uniform number before the logarithm in the published form.
PUBLISHED_SHIFT = 1e-3

# Lower bound of a learned temperature, which divides logits.
LOWEST_TEMPERATURE = 1e-3


class HardConcrete(MaskDistribution):
    """Hard concrete distribution over independent mask entries.

    With noise e, an entry is s = sigmoid((e + logit) / temperature), stretched and clamped to [0, 1]:

        standard     e = log(u) - log(1 - u)            m = s * (upper - lower) + lower
        published    e = log(u + 0.001) - log(1 - u)    m = (s + lower) * (upper - lower)

    with u uniform on (0, 1). The published code of Li & Janson (2024) uses the second form, which is included for
    comparison: its noise is bounded from below, so an entry with a large logit (above about 5.4 with the other
    defaults) is never exactly 0, and the size penalty has no gradient there.

    Args:
        n_entries: number of mask entries.
        initial_logit: initial value of every logit; with the other defaults 2 keeps entries with probability 0.97.
        temperature: the lower, the more samples are exactly 0 or 1; positive. If it is learned, its initial value.
        learned_temperature: train a temperature for each entry, 0.001 plus the softplus of a parameter. (The published
            code has a ReLU instead, which has no gradient at the floor.)
        form: `standard` or `published` (see above).
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
        learned_temperature: bool = False,
        form: HardConcreteForm = "standard",
        lower: float = -0.1,
        upper: float = 1.1,
    ) -> None:
        super().__init__(n_entries, initial_logit)
        lowest = LOWEST_TEMPERATURE if learned_temperature else 0
        if not lowest < temperature < math.inf:
            raise ConfigurationError(f"temperature is {temperature}; expected more than {lowest}.")
        check_choice("form", form, get_args(HardConcreteForm))
        if not (lower < 0 and upper > 1):
            raise ConfigurationError(f"The stretch is ({lower}, {upper}); expected an end below 0 and one above 1.")
        if form == "published" and not (1 + lower) * (upper - lower) > 1:
            raise ConfigurationError(
                f"The stretch is ({lower}, {upper}); the published form needs (1 + lower) * (upper - lower) > 1, "
                "or no entry is ever exactly 1."
            )
        self.temperature = temperature
        self.form: HardConcreteForm = form
        self.lower = lower
        self.upper = upper
        self.raw_temperatures: nn.Parameter | None = None
        if learned_temperature:
            excess = temperature - LOWEST_TEMPERATURE
            inverse_softplus = excess + math.log(-math.expm1(-excess))
            self.raw_temperatures = nn.Parameter(torch.full((n_entries,), inverse_softplus))

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain values, for checkpoints."""
        return {
            "class": type(self).__name__,
            "temperature": self.temperature,
            "learned_temperature": self.raw_temperatures is not None,
            "form": self.form,
            "lower": self.lower,
            "upper": self.upper,
        }

    def temperatures(self) -> Float[Tensor, " entry"] | float:
        """Learned temperatures with gradients, or the fixed temperature of all entries."""
        if self.raw_temperatures is None:
            return self.temperature
        return LOWEST_TEMPERATURE + F.softplus(self.raw_temperatures)

    def keep_probability(self) -> Float[Tensor, " entry"]:
        """Probability that a sample is not exactly 0; its sum is the L0 penalty of the paper."""
        scale, offset = self._stretch()
        cut = (0.0 - offset) / scale  # value of the sigmoid below which samples are clamped to 0
        least_noise = self.temperatures() * math.log(cut / (1 - cut)) - self.logits
        logistic = torch.sigmoid(-least_noise)
        # log(u + shift) - log(1 - u) > x where u > (exp(x) - shift) / (exp(x) + 1), and u is never below 0.
        return ((1 + PUBLISHED_SHIFT) * logistic).clamp(max=1.0) if self.form == "published" else logistic

    def sample(self, uniform: Float[Tensor, "row entry"]) -> Float[Tensor, "row entry"]:
        """Masks from uniform numbers; gradients flow where a sample lies strictly between 0 and 1."""
        if self.form == "published":
            noise = (uniform + PUBLISHED_SHIFT).log() - torch.log1p(-uniform)
        else:
            # Generators can return exactly 0, whose logit is infinite.
            noise = torch.logit(uniform.clamp(min=torch.finfo(uniform.dtype).tiny))
        soft = torch.sigmoid((noise + self.logits) / self.temperatures())
        scale, offset = self._stretch()
        return F.hardtanh(soft * scale + offset, 0.0, 1.0)

    def _stretch(self) -> tuple[float, float]:
        """Slope and offset of the stretch."""
        scale = self.upper - self.lower
        return scale, self.lower * scale if self.form == "published" else self.lower
