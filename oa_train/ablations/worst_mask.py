"""The worst mask: projected gradient ascent on the loss, over mask entries in [0, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import CleanLogits, pieces
from oa_train.batches import Batch
from oa_train.checks import check_at_least
from oa_train.engine.chunks import ROWS_PER_RUN
from oa_train.engine.levels import copies_logits
from oa_train.engine.reading import read_values
from oa_train.errors import ConfigurationError
from oa_train.metrics.measures import Loss, loss_of
from oa_train.models.frozen import CausalLM
from oa_train.models.levels import Level
from oa_train.progress import WITH_GRADIENTS, Advance
from oa_train.shapes import Bool, Float, Tensor


@dataclass(frozen=True)
class AscentSettings:
    """Settings of the search for the worst mask.

    Attributes:
        steps: steps of each ascent.
        step_size: change of every mask entry in a step, in the direction of the sign of its gradient.
        random_starts: ascents from uniformly random values, besides those from all zeros and from the worst random
            subset.
        n_prompts: validation prompts; every step runs on all of them.
        rows_per_run: most rows (starts times prompts) of one model run; limits memory, not results.
    """

    steps: int = 40
    step_size: float = 0.05
    random_starts: int = 3
    n_prompts: int = 16
    rows_per_run: int = ROWS_PER_RUN

    def __post_init__(self) -> None:
        check_at_least(0, steps=self.steps, random_starts=self.random_starts)
        check_at_least(1, n_prompts=self.n_prompts, rows_per_run=self.rows_per_run)
        if not 0 < self.step_size <= 1:
            raise ConfigurationError(f"step_size is {self.step_size}; expected more than 0 and at most 1.")

    def passes(self, n_starts: int) -> int:
        """Passes of `ascend`, counted as in `progress`; the last masks need no gradient."""
        return n_starts * self.n_prompts * (WITH_GRADIENTS * self.steps + 1)


@dataclass(frozen=True, eq=False)
class Ascended:
    """Worst masks of several ascents, and their mean losses on the prompts of the ascent.

    Attributes:
        masks: for each ascent, the mask with the largest loss.
        losses: losses of these masks.
        first_losses: losses of the starts.
    """

    masks: Float[Tensor, "start entry"]
    losses: Float[Tensor, " start"]
    first_losses: Float[Tensor, " start"]


def ascend(
    model: CausalLM,
    batches: Sequence[Batch],
    level: Level,
    starts: Float[Tensor, "start entry"],
    free: Bool[Tensor, " entry"],
    ablation: Ablation,
    settings: AscentSettings,
    loss: Loss = "kl",
    advance: Advance = lambda done: None,
) -> Ascended:
    """Maximise the mean loss on some prompts over mask entries in [0, 1] that are the same for all prompts.

    A step adds `step_size` times the sign of the gradient, and clamps to [0, 1]. The worst mask of all steps is kept,
    so its loss is never below that of the start. Without steps the starts are evaluated as they are.

    Each ascent has a start, a mask in [0, 1] of which the `free` entries may change. Every step runs on all batches,
    which are on any device. `advance` counts passes.
    """
    ablation, clean, n_prompts = ablation.to(model.device), CleanLogits(model), sum(map(len, batches))

    def losses_and_gradient(masks: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor]:
        """Mean loss of each mask over all prompts, and its gradient, or zeros if no gradients are wanted."""
        totals, gradient = masks.new_zeros(len(masks)), torch.zeros_like(masks)
        for batch in batches:
            runs = pieces(model, batch, clean(batch), level, masks, settings.rows_per_run, gradients=True)
            for piece, unmasked, slices in runs:
                values = ablation.replacements(piece, partial(read_values, model, level=level))
                for chosen in slices:
                    of_slice = masks[chosen].detach().requires_grad_(with_gradients)
                    copies = len(of_slice)
                    with torch.set_grad_enabled(with_gradients):
                        logits = copies_logits(model, piece, level, of_slice, values.repeat(copies))
                        of_rows = loss_of(loss, unmasked, logits, piece.repeat(copies))
                        losses = of_rows.view(copies, -1).sum(dim=1) / n_prompts
                    if with_gradients:
                        # A sum over masks: the gradient of each is that of its own mean.
                        gradient[chosen] += torch.autograd.grad(losses.sum(), of_slice)[0]
                    totals[chosen] += losses.detach()
                    advance((WITH_GRADIENTS if with_gradients else 1) * copies * len(piece))
        return totals, gradient

    masks, free = starts.to(model.device), free.to(model.device)
    worst, first, highest = masks.clone(), masks.new_zeros(0), masks.new_full((len(masks),), -torch.inf)
    for step in range(settings.steps + 1):
        losses, gradient = losses_and_gradient(masks, with_gradients=step < settings.steps)
        first = first if step else losses
        is_worse = losses > highest
        highest, worst = torch.where(is_worse, losses, highest), torch.where(is_worse.unsqueeze(1), masks, worst)
        masks = (masks + settings.step_size * gradient.sign() * free).clamp(0, 1)
    return Ascended(worst.cpu(), highest.cpu(), first.cpu())
