"""The strategy for models that are too large for one device: the frozen model is sharded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy

from oa_train.shapes import Tensor


class ShardedStrategy(ModelParallelStrategy):
    """Shards the frozen model across all processes (FSDP2); trained tensors are replicated.

    A process keeps its shard of every weight, and gathers a decoder block only while the block runs. Masks and
    constants are small, so every process has all of them, and their gradients are averaged after each backward pass,
    as in DDP. Checkpoints hold the trained tensors and nothing else. They are the same under every strategy, so a run
    may be resumed under another one.

    Args:
        process_group_backend: `nccl`, `gloo`, ...; by default that of the device.
        timeout: how long a process waits for the others.
    """

    # The content of checkpoints is not sharded, so it is written and read as under any parallel strategy.
    lightning_module_state_dict = ParallelStrategy.lightning_module_state_dict
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    optimizer_state = ParallelStrategy.optimizer_state
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint
    restore_checkpoint_after_setup = ParallelStrategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = ParallelStrategy.lightning_restore_optimizer

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = None) -> None:
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            **options,
        )
        self._averages = True

    def setup_environment(self) -> None:
        """Connect the processes, all of which share the model."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Do not average gradients; used for all batches of an accumulation except the last."""
        self._averages = False
        try:
            yield
        finally:
            self._averages = True

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass and average the gradients over processes, before any hook sees them."""
        module = self.lightning_module
        assert module is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        if self._averages:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(self.reduce(parameter.grad, reduce_op="mean"))
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss


def share_from_first_process(tensors: Iterable[torch.Tensor]) -> None:
    """Broadcast tensors from rank 0: sums on a GPU may differ in their last bits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), src=0)
