"""Gaussian noise in place of a component's value."""

import torch
from torch.nn.utils.rnn import pad_sequence

from oa_train.ablations.base import Ablation, SourceValues, ValuesOf
from oa_train.ablations.constants import Constants
from oa_train.batches import Batch
from oa_train.seeds import torch_generator
from oa_train.shapes import Tensor


class NoiseAblation(Ablation):
    """Replaces each component by a draw from the normal distribution that has its mean and its spread.

    Dimensions are drawn independently of each other, and positions too, so that the noise carries nothing of the
    prompt: a total ablation. Each prompt's draw is seeded by its number.

    Args:
        mean: centre of the draws.
        spread: standard deviation in every dimension.
        seed: other seeds give other draws.
    """

    def __init__(self, mean: Constants, spread: Constants, seed: int) -> None:
        self.bos_token_id = mean.bos_token_id
        self._mean = mean
        self._spread = spread
        self._seed = seed

    def to(self, device: torch.device | str) -> "NoiseAblation":
        """Copy mean and spread to a device."""
        return NoiseAblation(self._mean.to(device), self._spread.to(device), self._seed)

    def replacements(self, batch: Batch, values_of: ValuesOf) -> SourceValues:
        """Draw noise for every row and position; no model is run."""
        del values_of
        mean, spread = self._mean.replacements(batch), self._spread.replacements(batch)
        tables = zip(("inputs", "heads", "mlps"), mean.tensors(), spread.tensors(), strict=True)
        return SourceValues(*(centre + width * self._draw(what, centre, batch) for what, centre, width in tables))

    def _draw(self, what: str, like: Tensor, batch: Batch) -> Tensor:
        """Standard normal numbers [layer, row, position, ...].

        They are drawn for a row's real tokens and laid out from the first of them, so padding does not move them.
        """
        n_layers, widths = like.shape[0], like.shape[3:]
        rows = []
        for number, length in zip(batch.example_ids.tolist(), batch.lengths.tolist(), strict=True):
            generator = torch_generator(self._seed, "noise", what, number, device=like.device)
            rows.append(torch.randn(length, n_layers, *widths, generator=generator, device=like.device))
        drawn = pad_sequence(rows, batch_first=True)
        aligned = drawn[torch.arange(len(batch), device=like.device).unsqueeze(1), batch.positions]
        return aligned.movedim(2, 0).to(like.dtype)
