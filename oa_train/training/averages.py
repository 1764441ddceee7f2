"""Figures of several circuits, averaged over prompts and processes."""

import torch
from torchmetrics import Metric

from oa_train.shapes import Float, Tensor


class CircuitMeans(Metric):
    """Mean of a figure of each circuit over all prompts, on all processes.

    Args:
        n_circuits: how many.
    """

    total: Tensor
    count: Tensor

    def __init__(self, n_circuits: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(n_circuits), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, means: Float[Tensor, " circuit"], n_prompts: int) -> None:
        """Add the means over some prompts."""
        # Not in place: after a validation of its own Lightning leaves tensors that may not be written.
        self.total = self.total + means * n_prompts
        self.count = self.count + n_prompts

    def compute(self) -> Float[Tensor, " circuit"]:
        """The means over all prompts so far."""
        return self.total / self.count
