"""Losses that are summed over parts, with the activations of only one part in memory at a time."""

from collections.abc import Callable, Iterable, Sequence

import torch

from oa_train.shapes import Float, Tensor

# Half precision would round the small gradients of a mean to 0. Scaling by a power of two changes no other digit.
SCALE = 2.0**10


def summed(
    parts: Iterable[Callable[[], Float[Tensor, " value"]]], parameters: Sequence[Tensor]
) -> tuple[list[Float[Tensor, " value"]], Float[Tensor, ""]]:
    """Values of all parts, and a scalar with the value and the gradient of their sum.

    Each part's gradient is computed immediately, so that its activations are freed before the next part runs; the
    scalar is linear in the parameters, with the total gradient as its slope.

    Args:
        parts: functions that compute values with gradients to the parameters.
        parameters: the trained parameters.
    """
    slopes = [torch.zeros_like(parameter) for parameter in parameters]
    values = []
    for part in parts:
        with torch.enable_grad():
            of_part = part()
        gradients = torch.autograd.grad(of_part.sum() * SCALE, parameters, allow_unused=True)
        for slope, gradient in zip(slopes, gradients, strict=True):
            if gradient is not None:
                slope.add_(gradient, alpha=1 / SCALE)
        values.append(of_part.detach())
    linear = torch.stack([(p * slope).sum() for p, slope in zip(parameters, slopes, strict=True)]).sum()
    total = torch.stack([value.sum() for value in values]).sum()
    return values, linear + (total - linear.detach())
