"""The best values so far, by validation loss, of tensors that are trained side by side."""

from collections.abc import Mapping

import torch
from torch import nn

from oa_train.shapes import Float, Tensor


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
