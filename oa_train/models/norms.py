"""What the norms of a model compute, read off its modules.

Every norm is (x - mean of x) / sqrt(mean square + epsilon) * gain + bias. A layer norm has all of it, an RMS norm
takes no mean off and has no bias.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oa_train.shapes import Float, Tensor


@dataclass(frozen=True, eq=False)
class NormWeights:
    """What one norm computes.

    Attributes:
        centred: whether the mean is taken off first.
        epsilon: what is added to the mean square.
        gain: what each dimension is multiplied with; None stands for ones.
        bias: what is added to each dimension; None stands for zeros.
    """

    centred: bool
    epsilon: float
    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None

    @classmethod
    def of(cls, norm: Any) -> "NormWeights":
        """Read them off one of Hugging Face's norms."""
        if is_layer_norm(norm):
            # OLMo's has no parameters, and its epsilon stands in its code.
            return cls(True, getattr(norm, "eps", 1e-5), getattr(norm, "weight", None), getattr(norm, "bias", None))
        epsilon = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
        # Families differ in how they store the gain, and agree in what they make of ones.
        ones = torch.ones_like(norm.weight, dtype=torch.promote_types(norm.weight.dtype, torch.float32))
        return cls(False, epsilon, norm.forward(ones) * (1 + epsilon) ** 0.5, None)

    def factor(self, inputs: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token 1"]:
        """1 / sqrt(mean square + epsilon) of inputs whose mean is off, in single precision at least."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        length = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True, dtype=dtype)
        factor: Tensor = (length.square() / inputs.shape[-1] + self.epsilon).rsqrt()
        return factor


def is_layer_norm(norm: nn.Module) -> bool:
    """Whether a norm takes off the mean."""
    return hasattr(norm, "normalized_shape")


def rms_norm_scale(norm: nn.Module, total: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
    """What an RMS norm multiplies its input with, with gradients to the input."""
    weights = NormWeights.of(norm)
    assert weights.gain is not None
    return (weights.factor(total) * weights.gain).to(total.dtype)
