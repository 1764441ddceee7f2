"""Metrics of several circuits, averaged over prompts and processes."""

from collections.abc import Mapping

import torch
from torchmetrics import Metric

from oa_train.shapes import Float, Tensor


class CircuitMeans(Metric):
    """Means of each circuit's metrics over all prompts of all processes.

    Args:
        n_figures: maximum number of metrics.
        n_circuits: number of circuits.
    """

    total: Tensor
    count: Tensor

    def __init__(self, n_figures: int, n_circuits: int) -> None:
        super().__init__()
        self.n_circuits = n_circuits
        self.add_state("total", torch.zeros(n_figures, n_circuits), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, means: Float[Tensor, "figure circuit"], n_prompts: int) -> None:
        """Add means over `n_prompts` prompts, for all metrics or the first few."""
        sums = torch.nn.functional.pad(means * n_prompts, (0, 0, 0, len(self.total) - len(means)))
        # Not in place: a standalone validation by Lightning leaves inference tensors, which are read-only.
        self.total = self.total + sums
        self.count = self.count + n_prompts

    def compute(self) -> Float[Tensor, "figure circuit"]:
        """The means over all prompts so far."""
        return self.total / self.count

    def taken(self) -> Float[Tensor, "figure circuit"]:
        """The means, after which they start anew."""
        means: Tensor = self.compute()
        self.reset()
        return means


def each_and_mean(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means of metrics over circuits and, if there are several, each circuit's metrics as `name/index`."""
    shown = {name: values.float().mean() for name, values in figures.items()}
    for name, values in figures.items():
        if len(values) > 1:
            shown |= {f"{name}/{number}": value for number, value in enumerate(values.float())}
    return shown
