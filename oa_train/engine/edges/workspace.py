"""Large tensors that are reused from one step to the next.

On a CPU the memory of large tensors is returned to the operating system, which zeroes each page before it hands it out
again: a sixth of the time of a step. The allocators of accelerators cache memory themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from oa_train.shapes import Tensor

# Gap between entries, an odd number of cache lines: entry sizes are multiples of large powers of two, and without the
# gap products over many entries would compete for a few cache sets.
BYTES_APART = 13 * 64


class Workspace:
    """A pool with at most one free tensor per name; a tensor that was taken is not free until it is given back."""

    def __init__(self) -> None:
        self._free: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor [entry, ...], with a gap between entries."""
        n_entries, size = shape[0], torch.Size(shape[1:]).numel()
        stride = size + BYTES_APART // dtype.itemsize
        flat = self._free.pop(name, None)
        if flat is None or flat.numel() < n_entries * stride or (flat.dtype, flat.device) != (dtype, device):
            # Not an inference tensor, even if evaluation takes it first: training reuses it.
            with torch.inference_mode(False):
                flat = torch.empty(n_entries * stride, dtype=dtype, device=device)
        return flat[: n_entries * stride].view(n_entries, stride)[:, :size].view(shape)

    def give(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor for the next `take`."""
        if tensor.device.type == "cpu":
            with torch.inference_mode(False):
                self._free[name] = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())

    @contextmanager
    def lend(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """Lend a flat uninitialised tensor for the duration of the context."""
        tensor = self.take(name, (1, size), dtype, device)
        yield tensor[0]
        self.give(name, tensor)


_workspaces: WeakKeyDictionary[nn.Module, Workspace] = WeakKeyDictionary()


def workspace_of(model: nn.Module) -> Workspace:
    """The workspace of a model, which is freed with the model."""
    return _workspaces.setdefault(model, Workspace())


def free_workspace(model: nn.Module) -> None:
    """Free the memory that is kept for a model's next run."""
    _workspaces.pop(model, None)
