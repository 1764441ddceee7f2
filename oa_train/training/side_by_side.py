"""Tensors that are trained side by side: one step of all of them, and the best of each by validation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from oa_train.batches import Batch
from oa_train.shapes import Float, Tensor
from oa_train.training.averages import CircuitMeans
from oa_train.training.module import FrozenModelModule
from oa_train.training.optimizers import LRSchedulerCallable, OptimizerCallable, decaying_to_zero
from oa_train.training.steps import share_of_step

# Half precision would round the small gradients of a mean to 0. A power of two changes no digit otherwise.
SCALE = 2.0**10

# A loss by the name it is logged under, the numbers of some of the trainings, and a function that computes their share
# of it, with gradients.
Part = tuple[str, Any, Callable[[], Float[Tensor, " training"]]]


class SideBySideModule(FrozenModelModule):
    """Runs independent trainings on the same prompts, and keeps the best of each by validation.

    By default learning rates fall to zero over the whole training; see `FrozenModelModule` for the arguments.

    Attributes:
        losses: means over the prompts of an evaluation, of every training.
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
        """A step on the sum of all losses, so that each training's gradient is its own, whatever runs beside it."""
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
    """Values of all parts, and a number with the value and the gradient of their sum.

    Each part's gradient is taken at once, so that its activations are freed before the next part runs; the number is
    linear in the parameters, with the total gradient as its slope.

    Args:
        parts: functions that compute values with gradients to the parameters.
        parameters: what is trained.
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
    """The slices with the lowest loss so far of tensors whose first dimension counts independent trainings.

    Buffers, which checkpoints store.

    Args:
        tensors: by name, [training, ...] each.

    Attributes:
        loss: lowest loss of each training; infinite before the first offer.
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
        """Keep the slices of every training whose loss is lower than before; NaN never is."""
        loss = loss.to(self.loss)
        better = loss < self.loss
        for name, best in self.tensors().items():
            best[better] = tensors[name][better].to(best.dtype)
        self.loss[better] = loss[better]

    def known(self) -> bool:
        """True once every training was offered something finite."""
        return bool(torch.isfinite(self.loss).all())
