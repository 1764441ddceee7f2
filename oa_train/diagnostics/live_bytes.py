"""Counting the bytes of live tensors."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oa_train.shapes import Tensor


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that were created inside the context, each storage once.

    Attributes:
        now: bytes that are live now.
        peak: maximum of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if getattr(function, "namespace", "") == "fsdp":
            # FSDP frees gathered weights by resizing their storages, which is not dispatched; the next all-gather is,
            # so the sizes are read again then.
            for key, storage in list(self._storages.items()):
                self._set(key, storage.nbytes())
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        for tensor in filter(_is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            # Views and in-place results of tensors that existed before the context are not new.
            if storage._cdata not in before and storage._cdata not in self._sizes:
                self._storages[storage._cdata] = storage
                weakref.finalize(storage, self._drop, storage._cdata)
                self._set(storage._cdata, storage.nbytes())
        return made

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self.peak = max(self.peak, self.now)
        self._sizes[key] = size

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
