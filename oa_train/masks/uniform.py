"""Uniform gradient sampling (UGS): masks that are 0, 1, or uniform between the two.

Li & Janson, Optimal ablation for interpretability (NeurIPS 2024). With keep-probability theta = sigmoid(logit) an
entry is drawn uniformly from the window (0, 1) with probability w = theta (1 - theta); otherwise it is 1 or 0, such
that its mean is theta. Over uniform m the mean of dL/dm is L(kept) - L(ablated), so inside the window the derivative
of the loss estimates what the entry is worth. The gradient of the logit is scaled to theta (1 - theta) times that
estimate.
"""

from typing import Any, Literal, get_args

import torch

from oa_train.checks import check_choice
from oa_train.errors import ConfigurationError
from oa_train.masks.base import MaskDistribution
from oa_train.shapes import Bool, Float, Tensor

CountNormalization = Literal["empirical", "expected"]

# A window narrower than this would divide by zero when theta saturates; it is reached at |logit| > 13.
NARROWEST_WINDOW = 1e-6


class UniformGradientSampling(MaskDistribution):
    """Uniform gradient sampling over independent mask entries.

    Args:
        n_entries: number of mask entries.
        initial_logit: initial value of every logit; 1 keeps entries with probability 0.73.
        window_scale: width of the window as a multiple of theta (1 - theta); above 0 and at most 2, beyond which
            the window would leave [0, 1].
        count_normalization: `empirical` averages an entry's gradient over the rows of a step that fell into its
            window, which lowers the variance; `expected` divides by the expected number of such rows, which makes the
            estimate unbiased and linear in the rows.
    """

    def __init__(
        self,
        n_entries: int,
        *,
        initial_logit: float = 1.0,
        window_scale: float = 1.0,
        count_normalization: CountNormalization = "empirical",
    ) -> None:
        super().__init__(n_entries, initial_logit)
        if not 0.0 < window_scale <= 2.0:
            raise ConfigurationError(f"window_scale is {window_scale}; expected more than 0 and at most 2.")
        check_choice("count_normalization", count_normalization, get_args(CountNormalization))
        self.window_scale = window_scale
        self.count_normalization = count_normalization

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain values, for checkpoints."""
        return {
            "class": type(self).__name__,
            "window_scale": self.window_scale,
            "count_normalization": self.count_normalization,
        }

    def keep_probability(self) -> Float[Tensor, " entry"]:
        """The sigmoid of the logit, theta."""
        return torch.sigmoid(self.logits)

    def sample(self, uniform: Float[Tensor, "row entry"]) -> Float[Tensor, "row entry"]:
        """Masks from uniform numbers; see the module's docstring for their distribution and gradient."""
        theta = self.keep_probability()
        fixed = theta.detach()
        window = (self.window_scale * fixed * (1 - fixed)).clamp(min=NARROWEST_WINDOW)
        mask = (0.5 + (fixed - uniform) / window).clamp(0.0, 1.0)
        weight = 1 / window if self.count_normalization == "expected" else 1.0
        # The difference is zero, so the value is unchanged; its gradient to theta is `weight` inside the window.
        return mask + weight * _inside(mask) * (theta - fixed)

    def carries_gradient(self, mask: Float[Tensor, "row entry"]) -> Bool[Tensor, "row entry"] | None:
        """Samples inside the window, over which `empirical` averages; None for `expected`, which counts none."""
        return _inside(mask) if self.count_normalization == "empirical" else None


def _inside(mask: Tensor) -> Tensor:
    return (mask > 0) & (mask < 1)
