"""Masks for the prompts of a training step, from random numbers that depend on the prompt alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from oa_train.masks.base import MaskDistribution, averaged_gradient
from oa_train.seeds import torch_generator
from oa_train.shapes import Float, Int, Tensor


@dataclass(frozen=True, eq=False)
class StepRows:
    """Numbers of rows in one optimiser step, summed over accumulated batches and processes.

    `counts` is the number of rows that carry gradient to each mask entry, `n_rows` that of all rows.
    """

    counts: Int[Tensor, " entry"]
    n_rows: int


class MaskSampler:
    """Draws masks that depend on the seed and a prompt's index, not on how prompts are split among processes.

    Args:
        masks: distribution of the masks.
        seed: seed of the random numbers.
        samples_per_prompt: S, the number of masks for each prompt.
        effective: sets those entries of drawn masks to 0 that have no effect given the others, such as dangling edges;
            they count as samples without gradient.
    """

    def __init__(
        self,
        masks: MaskDistribution,
        seed: int,
        samples_per_prompt: int,
        effective: Callable[[Tensor], Tensor] = lambda drawn: drawn,
    ) -> None:
        self._masks, self._seed, self._samples_per_prompt = masks, seed, samples_per_prompt
        self._effective = effective

    def draw(self, numbers: Int[Tensor, " batch"], step: StepRows | None = None) -> Float[Tensor, "row entry"]:
        """Draw S * B masks for B prompts, laid out as `batch.repeat(S)`, with gradients to the distribution.

        Gradients are averaged over the rows of `step`, by default over those drawn here.
        """
        drawn, inside = self._drawn(numbers)
        if inside is None:
            return drawn
        rows = step or StepRows(inside.sum(dim=0), len(drawn))
        return averaged_gradient(drawn, rows.counts, rows.n_rows)

    @torch.no_grad()
    def rows_of_step(
        self, batches: Sequence[Int[Tensor, " batch"]], over_processes: Callable[[Tensor], Tensor], n_processes: int
    ) -> StepRows | None:
        """Count the rows that carry gradient in a whole step of the optimiser.

        Args:
            batches: prompt indices of each of this process's batches in the step. Their masks can be drawn in advance,
                because the parameters do not change before the step.
            over_processes: sums a tensor over processes.
            n_processes: number of processes; all have the same number of prompts.

        Returns:
            None for a distribution whose gradients are not averaged.
        """
        counts, n_rows = torch.zeros_like(self._masks.logits, dtype=torch.long), 0
        for numbers in batches:
            _, inside = self._drawn(numbers)
            if inside is None:
                return None
            counts += inside.sum(dim=0)
            n_rows += len(inside)
        return StepRows(over_processes(counts), n_rows * n_processes)

    def _drawn(self, numbers: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor | None]:
        """Effective masks, and the samples that carry gradient."""
        drawn = self._effective(self._masks.sample(self._uniform(numbers)))
        return drawn, self._masks.carries_gradient(drawn)

    def _uniform(self, numbers: Int[Tensor, " batch"]) -> Float[Tensor, "row entry"]:
        shape, device = (self._samples_per_prompt, len(self._masks.logits)), self._masks.logits.device
        drawn = [
            torch.rand(shape, generator=torch_generator(self._seed, "masks", number, device=device), device=device)
            for number in numbers.tolist()
        ]
        return torch.stack(drawn, dim=1).flatten(0, 1)
