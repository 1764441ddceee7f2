"""Streaming means of component values: exact over batches, halves and processes.

Sums are kept in float64 together with counts, so merging is addition and no order of batches matters beyond the last
bits of float64.
"""

from collections.abc import Callable

import torch

from oa_train.ablations.base import SourceValues
from oa_train.ablations.constants import Constants
from oa_train.shapes import Bool, Int, Tensor


class StreamingMeans:
    """Sums of component values for each position, over all real tokens shown so far.

    Args:
        bos_token_id: token that is never ablated at the first position; handed on to the constants.

    Attributes:
        inputs: sums of the embedding, [1, position, d_model], float64.
        heads: sums of head values, [layer, position, head, d_head], float64.
        mlps: sums of MLP outputs, [layer, position, d_model], float64.
        counts: tokens summed at each position, [position].
    """

    def __init__(self, bos_token_id: int | None = None) -> None:
        self.bos_token_id = bos_token_id
        self.inputs = torch.zeros(0, 0, 0, dtype=torch.float64)
        self.heads = torch.zeros(0, 0, 0, 0, dtype=torch.float64)
        self.mlps = torch.zeros(0, 0, 0, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.long)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, heads and MLPs; positions are dimension 1 of each."""
        return self.inputs, self.heads, self.mlps

    def add(
        self,
        values: SourceValues,
        positions: Int[Tensor, "batch position"],
        counted: Bool[Tensor, "batch position"],
        of: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        """Add the values of a batch.

        Args:
            values: of every source.
            positions: position of each token counted from its row's first real token.
            counted: tokens that take part: real, not protected, at or before the scored position.
            of: applied to the values in float64 before they are summed.
        """
        size = int(positions[counted].max()) + 1 if counted.any() else 0
        batch = StreamingMeans()
        where = positions[counted]
        batch.inputs, batch.heads, batch.mlps = (
            _sum_by_position(one[:, counted], where, size, of) for one in values.tensors()
        )
        batch.counts = torch.bincount(where, minlength=size).cpu()
        self.merge(batch)

    def merge(self, other: "StreamingMeans") -> None:
        """Add the sums of another part of the data."""
        size = max(len(self.counts), len(other.counts))
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        self.inputs, self.heads, self.mlps = (_grown(mine, theirs, size) for mine, theirs in pairs)
        counts = torch.zeros(size, dtype=torch.long)
        counts[: len(self.counts)] += self.counts
        counts[: len(other.counts)] += other.counts
        self.counts = counts

    def table(self, n_positions: int) -> Constants:
        """Means as constants.

        Args:
            n_positions: 1 for one mean over all counted tokens; P for a mean of each of the positions 0 to P - 2 and
                one of all later tokens together. A position without tokens has the mean of the nearest one before it;
                the first is left zero when the beginning-of-sequence token stands there.

        Raises:
            ValueError: nothing was added.
        """
        return Constants.from_tensors((mean.float() for mean in self._means(n_positions)), self.bos_token_id)

    def spread(self, squares: "StreamingMeans", n_positions: int) -> Constants:
        """Standard deviations as constants.

        The difference of large numbers that they are made of is taken in float64, so that a mean which is a thousand
        times as large does no harm.

        Args:
            squares: sums of the squares of the same values.
            n_positions: as in `table`.
        """
        pairs = zip(squares._means(n_positions), self._means(n_positions), strict=True)
        spreads = ((square - mean.square()).clamp(min=0).sqrt().float() for square, mean in pairs)
        return Constants.from_tensors(spreads, self.bos_token_id)

    def _means(self, n_positions: int) -> list[Tensor]:
        """Means of inputs, heads and MLPs in float64, laid out as in `table`."""
        if not self.counts.sum():
            raise ValueError("No token was counted, so there is no mean.")
        last = n_positions - 1
        grown = max(0, n_positions - len(self.counts))
        counts = torch.cat([self.counts, self.counts.new_zeros(grown)])
        counts = torch.cat([counts[:last], counts[last:].sum(dim=0, keepdim=True)])
        size = len(self.counts) + grown
        return [_mean(_grown(sums, sums[:, :0], size), counts, last) for sums in self.tensors()]


def _sum_by_position(values: Tensor, where: Tensor, size: int, of: Callable[[Tensor], Tensor]) -> Tensor:
    device = "cpu" if values.device.type == "mps" else values.device  # which has no float64
    sums = torch.zeros(values.shape[0], size, *values.shape[2:], dtype=torch.float64, device=device)
    return sums.index_add_(1, where.to(device), of(values.to(device).double())).cpu()


def _grown(first: Tensor, second: Tensor, size: int) -> Tensor:
    shape = second.shape if first.numel() == 0 else first.shape
    total = torch.zeros(shape[0], size, *shape[2:], dtype=torch.float64)
    if first.numel():
        total[:, : first.shape[1]] += first
    if second.numel():
        total[:, : second.shape[1]] += second
    return total


def _mean(sums: Tensor, counts: Tensor, last: int) -> Tensor:
    table = torch.cat([sums[:, :last], sums[:, last:].sum(dim=1, keepdim=True)], dim=1)
    means = table / counts.clamp(min=1).view(1, -1, *[1] * (table.dim() - 2))
    numbers = torch.arange(len(counts))
    nearest = torch.where(counts > 0, numbers, 0).cummax(dim=0).values
    return means[:, nearest]
