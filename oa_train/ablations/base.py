"""Ablations: rules that supply the replacements of ablated units."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from oa_train.batches import Batch
from oa_train.engine.values import Values, side_by_side

# Runs the clean model on prompts and returns the values of its units.
ValuesOf = Callable[[Batch], Values]


class Ablation(ABC):
    """Supplies the replacements of a model's units on any prompts.

    The replacements on a prompt depend on the prompt and its index alone, never on the other prompts of a batch or on
    earlier calls.
    """

    @abstractmethod
    def replacements(self, batch: Batch, values_of: ValuesOf) -> Values:
        """Replacements for every row of a batch; `values_of` runs the clean model."""

    def to(self, device: torch.device | str) -> "Ablation":
        """Copy the tensors, if there are any, to a device."""
        return self


def replacements_of_copies(ablations: Sequence[Ablation], batch: Batch, copies: int, values_of: ValuesOf) -> Values:
    """Replacements for the copies that `Batch.repeat` makes of a batch, from one ablation for all or one for each."""
    if len(ablations) == 1:
        return ablations[0].replacements(batch, values_of).repeat(copies)
    return side_by_side([ablation.replacements(batch, values_of) for ablation in ablations], len(batch))
