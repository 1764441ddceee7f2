"""Processes that torchrun has started for a study."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def process_group() -> Iterator[int]:
    """Rank of this process in a group of all processes that lives as long as the context; 0 without torchrun."""
    if not dist.is_torchelastic_launched():
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def from_first(text: str) -> str:
    """The first process's text, broadcast to all."""
    texts = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(texts)
    return texts[0]
