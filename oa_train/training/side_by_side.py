"""Tensors that are trained side by side: a training step on all of them, and the best of each by validation loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from oa_train.batches import Batch
from oa_train.shapes import Float, Tensor
from oa_train.training.metric_averages import CircuitMeans
from oa_train.training.module import FrozenModelModule
from oa_train.training.optimizers import LRSchedulerCallable, OptimizerCallable, decaying_to_zero
from oa_train.training.steps import share_of_step

# Half precision would round the small gradients of a mean to 0. Scaling by a power of two changes no other digit.
SCALE = 2.0**10

# Name under which a loss is logged, indices of some of the training problems, and a function that computes their
# contributions to it, with gradients; those of several parts add up.
Part = tuple[str, Any, Callable[[], Float[Tensor, " training"]]]


class SideBySideModule(FrozenModelModule):
    """Solves independent training problems on the same prompts, and keeps the best of each by validation loss.

    By default learning rates decay to zero over the whole training; see `FrozenModelModule` for the arguments.

    Attributes:
        losses: mean losses of every training problem over the prompts of an evaluation.
    """

    keeps_best = True
    losses: CircuitMeans

    def __init__(
        self,
        arguments: Mapping[str, Any],
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(arguments, optimizer, lr_scheduler or partial(decaying_to_zero, self))

    def step_of_parts(self, parts: Sequence[Part], batch: Batch, batch_idx: int) -> Tensor:
        """A step on the sum of all losses; the gradient of each training problem is independent of the others."""
        values, loss = summed([part for *_, part in parts], list(self.named_trainables().values()))
        totals: dict[str, Tensor] = {}
        for (name, numbers, _), value in zip(parts, values, strict=True):
            total = totals.setdefault(name, torch.zeros(self.losses.n_circuits, device=self.device))
            total[numbers] += value
        means = {name: self.over_processes(total) for name, total in totals.items()}
        self.check_finite(means, "Losses", batch)
        for name, mean in means.items():
            self.log(name, mean.mean(), prog_bar=True, batch_size=len(batch))
        return loss * share_of_step(self.trainer, self.data.epoch_length, batch_idx)


def summed(
    parts: Iterable[Callable[[], Float[Tensor, " value"]]], parameters: Sequence[Tensor]
) -> tuple[list[Float[Tensor, " value"]], Float[Tensor, ""]]:
    """Values of all parts, and a scalar with the value and the gradient of their sum.

    Each part's gradient is computed immediately, so that its activations are freed before the next part runs; the
    scalar is linear in the parameters, with the total gradient as its slope.

    Args:
        parts: functions that compute values with gradients with respect to the parameters.
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


class BestSlices(nn.Module):
    """The slices with the lowest loss so far of tensors whose first dimension indexes independent training problems.

    They are buffers, so checkpoints store them.

    Args:
        tensors: tensors [training, ...] by name.

    Attributes:
        loss: lowest loss of each slice; infinite before the first offer.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone())
        self.loss = nn.Buffer(torch.full((len(next(iter(tensors.values()))),), torch.inf))

    def tensors(self) -> dict[str, Tensor]:
        """The best slices, by name."""
        return {name: getattr(self, name) for name in self._names}

    @torch.no_grad()
    def offer(self, tensors: Mapping[str, Tensor], loss: Float[Tensor, " training"]) -> None:
        """Keep every slice whose loss is lower than before; a NaN never is."""
        loss = loss.to(self.loss)
        better = loss < self.loss
        for name, best in self.tensors().items():
            best[better] = tensors[name][better].to(best.dtype)
        self.loss[better] = loss[better]

    def known(self) -> bool:
        """True once every slice has a finite loss."""
        return bool(torch.isfinite(self.loss).all())
