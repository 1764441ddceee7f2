"""Lifts the single precision inside of Hugging Face's code, so that tests can compare float64 to its last digits."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class WithoutSinglePrecision(TorchFunctionMode):
    """Inside, what would turn a float64 tensor into float32 leaves it float64.

    Several families norm, or compute attention weights, in float32 whatever the model's data type is. Such a result
    depends on how many rows and columns a batch has from its seventh digit on. Hugging Face's code is executed as it
    is; only its rounding to single precision is taken away.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves((args, kwargs))):
            if function is torch.Tensor.float:
                function = torch.Tensor.double
            args, kwargs = tree_map(_doubled, (args, kwargs))
        return function(*args, **kwargs)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
