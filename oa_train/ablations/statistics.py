"""Streaming means of component values: exact over batches, halves and processes.

Sums are kept in float64 together with counts, so merging is addition and no order of batches matters beyond the last
bits of float64.
"""

import torch

from oa_train.ablations.constants import Constants
from oa_train.shapes import Bool, Float, Int, Tensor


class StreamingMeans:
    """Sums of component values for each position, over all real tokens shown so far.

    Args:
        bos_token_id: token that is never ablated at the first position; handed on to the constants.

    Attributes:
        heads: sums of head values, [layer, position, head, d_head], float64.
        mlps: sums of MLP outputs, [layer, position, d_model], float64.
        counts: tokens summed at each position, [position].
    """

    def __init__(self, bos_token_id: int | None = None) -> None:
        self.bos_token_id = bos_token_id
        self.heads = torch.zeros(0, 0, 0, 0, dtype=torch.float64)
        self.mlps = torch.zeros(0, 0, 0, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.long)

    def add(
        self,
        heads: Float[Tensor, "layer batch position head d_head"],
        mlps: Float[Tensor, "layer batch position d_model"],
        positions: Int[Tensor, "batch position"],
        counted: Bool[Tensor, "batch position"],
    ) -> None:
        """Add the values of a batch.

        Args:
            heads: head values.
            mlps: MLP outputs.
            positions: position of each token counted from its row's first real token.
            counted: tokens that take part: real, not protected, at or before the scored position.
        """
        size = int(positions[counted].max()) + 1 if counted.any() else 0
        batch = StreamingMeans()
        where = positions[counted]
        batch.heads = _sum_by_position(heads[:, counted], where, size)
        batch.mlps = _sum_by_position(mlps[:, counted], where, size)
        batch.counts = torch.bincount(where, minlength=size).cpu()
        self.merge(batch)

    def merge(self, other: "StreamingMeans") -> None:
        """Add the sums of another part of the data."""
        size = max(len(self.counts), len(other.counts))
        self.heads = _grown(self.heads, other.heads, size)
        self.mlps = _grown(self.mlps, other.mlps, size)
        counts = torch.zeros(size, dtype=torch.long)
        counts[: len(self.counts)] += self.counts
        counts[: len(other.counts)] += other.counts
        self.counts = counts

    def pooled(self) -> Constants:
        """One mean for each component, over all counted tokens.

        Raises:
            ValueError: nothing was added.
        """
        return self._table(0)

    def per_position(self) -> Constants:
        """A mean for each position that every prompt has, and one for all positions after the last of those.

        Position 0 is empty when a beginning-of-sequence token stands there; its row is zero and never used.
        """
        full = (self.counts == self.counts.max()).nonzero()
        return self._table(int(full.max()) if len(full) else 0)

    def _table(self, last: int) -> Constants:
        if not self.counts.sum():
            raise ValueError("No token was counted, so there is no mean.")
        counts = torch.cat([self.counts[:last], self.counts[last:].sum(dim=0, keepdim=True)])
        return Constants(_mean(self.heads, counts, last), _mean(self.mlps, counts, last), self.bos_token_id)


def _sum_by_position(values: Tensor, where: Tensor, size: int) -> Tensor:
    sums = torch.zeros(values.shape[0], size, *values.shape[2:], dtype=torch.float64, device=values.device)
    return sums.index_add_(1, where, values.double()).cpu()


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
    return (table / counts.clamp(min=1).view(1, -1, *[1] * (table.dim() - 2))).float()
