"""Which parts of a model masks are drawn for, and what a draw means for all of them."""

from collections.abc import Sequence

import torch
from torch import nn

from oa_train.models.pruning import without_dangling
from oa_train.errors import ConfigurationError
from oa_train.models.selection import Components
from oa_train.models.graph import Graph
from oa_train.shapes import Float, Int, Tensor


class MaskedParts(nn.Module):
    """The parts, components or edges, that masks are drawn for; all others are always kept.

    Args:
        parts: all parts of the model.
        patterns: shell patterns of the selected ones.

    Attributes:
        selection: true for parts that are selected.

    Raises:
        ConfigurationError: a pattern matches nothing, or all patterns together select nothing.
    """

    def __init__(self, parts: Components | Graph, patterns: Sequence[str]) -> None:
        super().__init__()
        self.parts = parts
        self._patterns = list(patterns)
        self.selection: Tensor
        everything = self._patterns == ["*"]
        selection = torch.ones(len(parts), dtype=torch.bool) if everything else parts.mask(parts.select(patterns))
        if not selection.any():
            raise ConfigurationError(f"components is {self._patterns}, which selects nothing that could be trained.")
        self.register_buffer("selection", selection, persistent=False)
        self.n_selected = int(selection.sum())

    @property
    def n_fixed(self) -> int:
        """How many parts are always kept."""
        return len(self.parts) - self.n_selected

    @property
    def description(self) -> list[str]:
        """What is selected: names of components; of edges, which may be millions, the patterns."""
        return list(self.parts.kept(self.selection)) if isinstance(self.parts, Components) else self._patterns

    def spread(self, drawn: Tensor) -> Tensor:
        """Masks [row, entry] over all parts, from masks over the selected ones, of the same type."""
        if not self.n_fixed:
            return drawn
        kept = torch.ones(len(drawn), len(self.parts), device=drawn.device, dtype=drawn.dtype)
        return kept.masked_scatter(self.selection, drawn)

    def by_circuit(self, drawn: Tensor) -> Tensor:
        """Masks [circuit, row, entry], from rows in which the entries of all circuits stand side by side."""
        return drawn.view(len(drawn), -1, self.n_selected).transpose(0, 1)

    def effective(self, drawn: Float[Tensor, "row entry"]) -> Float[Tensor, "row entry"]:
        """Drawn masks with 0 for edges that lie on no way from the input to the logits.

        Args:
            drawn: in each row the entries of all circuits, side by side; each circuit of each row is seen by itself.
        """
        if isinstance(self.parts, Components):
            return drawn
        each = drawn.reshape(-1, self.n_selected)
        lasting = without_dangling(self.parts, self.spread(each > 0))
        return (each * lasting[:, self.selection]).view(drawn.shape)

    def selected_pairs(
        self, entries: Int[Tensor, " pair"], others: Int[Tensor, " pair"]
    ) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Of pairs of a part and something else those whose part is selected, by its number among these."""
        numbers = self.selection.cumsum(dim=0) - 1
        chosen = self.selection[entries]
        return numbers[entries[chosen]], others[chosen]
