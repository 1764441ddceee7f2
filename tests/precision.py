"""Lifts the single precision inside of Hugging Face's code, so that tests can compare float64 to its last digits."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class WithoutSinglePrecision(TorchFunctionMode):
    """Inside, what would turn a float64 tensor into float32 in the code of transformers leaves it float64.

    Several families norm, or compute attention weights, in float32 whatever the model's data type is. Such a result
    depends on how many rows and columns a batch has from its seventh digit on. Hugging Face's code is executed as it
    is; only its rounding to single precision is taken away. The package's own code is left alone.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _GRADIENTS:
            # PyTorch suspends a mode for the call that the mode handles; blocks that are run again inside it need it.
            with patch.object(
                torch.autograd, "_engine_run_backward", self._inside(torch.autograd._engine_run_backward)
            ):
                return function(*args, **kwargs)
        # Few calls name single precision, and the other tests take longer.
        named = function is torch.Tensor.float or any(value is torch.float32 for value in (*args, *kwargs.values()))
        if named and _called_by_transformers(sys._getframe(1)) and any(map(_is_double, tree_leaves((args, kwargs)))):
            if function is torch.Tensor.float:
                function = torch.Tensor.double
            args, kwargs = tree_map(_doubled, (args, kwargs))
        return function(*args, **kwargs)

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run


def _is_double(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _called_by_transformers(frame: FrameType | None) -> bool:
    """Whether the nearest frame that is not torch's own is one of transformers."""
    while frame is not None and _package(frame) == "torch":
        frame = frame.f_back
    return frame is not None and _package(frame) == "transformers"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
