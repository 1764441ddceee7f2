"""The worst mask: projected gradient ascent on the loss, over mask entries in [0, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import CleanLogits
from oa_train.batches import Batch
from oa_train.checks import check_at_least
from oa_train.engine.chunks import ROWS_PER_RUN, chunks
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
        rows_per_run: most rows (starts times prompts) of one model run; bounds memory, changes no result.
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
    so its loss is never below that of the start.

    Args:
        model: frozen causal language model.
        batches: the prompts, on any device; each step runs on all of them.
        level: level of the masks.
        starts: initial mask of each ascent, in [0, 1].
        free: entries that may change.
        ablation: supplies the replacements.
        settings: number of steps and their size.
        loss: name of the loss to maximise.
        advance: counts passes.
    """
    device, ablation, clean = model.device, ablation.to(model.device), CleanLogits(model)
    masks, free = starts.to(device), free.to(device)
    worst, first, highest = masks.clone(), masks.new_zeros(0), masks.new_full((len(masks),), -torch.inf)
    for step in range(settings.steps + 1):
        with_gradients = step < settings.steps
        losses, gradient = _losses(
            model, batches, clean, level, masks, ablation, settings.rows_per_run, loss, with_gradients, advance
        )
        first = first if step else losses
        is_worse = losses > highest
        highest, worst = torch.where(is_worse, losses, highest), torch.where(is_worse.unsqueeze(1), masks, worst)
        masks = (masks + settings.step_size * gradient.sign() * free).clamp(0, 1)
    return Ascended(worst.cpu(), highest.cpu(), first.cpu())


def mean_losses(
    model: CausalLM,
    batches: Sequence[Batch],
    level: Level,
    masks: Float[Tensor, "start entry"],
    ablation: Ablation,
    loss: Loss = "kl",
    rows_per_run: int = ROWS_PER_RUN,
    advance: Advance = lambda done: None,
) -> Float[Tensor, " start"]:
    """Mean loss of each mask over some prompts, on the CPU; see `ascend`."""
    args = model, batches, CleanLogits(model), level, masks.to(model.device), ablation.to(model.device)
    return _losses(*args, rows_per_run, loss, False, advance)[0].cpu()


def _losses(
    model: CausalLM,
    batches: Sequence[Batch],
    clean: CleanLogits,
    level: Level,
    masks: Float[Tensor, "start entry"],
    ablation: Ablation,
    rows_per_run: int,
    loss: Loss,
    with_gradients: bool,
    advance: Advance,
) -> tuple[Float[Tensor, " start"], Float[Tensor, "start entry"]]:
    """Mean loss of each mask over all prompts, and its gradient, or zeros if no gradients are wanted."""
    n_prompts = sum(map(len, batches))
    totals, gradient = masks.new_zeros(len(masks)), torch.zeros_like(masks)
    for batch in batches:
        logits_of_batch, done = clean(batch).to(masks.device), 0
        on_device = batch.to(masks.device)
        for piece, slices in chunks(model, level, on_device, masks, rows_per_run, gradients=True):
            unmasked, done = logits_of_batch[done : done + len(piece)], done + len(piece)
            values = ablation.replacements(piece, partial(read_values, model, level=level))
            for starts in slices:
                chosen = masks[starts].detach().requires_grad_(with_gradients)
                n_starts = len(chosen)
                with torch.set_grad_enabled(with_gradients):
                    logits = copies_logits(model, piece, level, chosen, values.repeat(n_starts))
                    of_rows = loss_of(loss, unmasked, logits, piece.repeat(n_starts))
                    of_starts = of_rows.view(n_starts, -1).sum(dim=1) / n_prompts
                if with_gradients:
                    # A sum over starts: the gradient of each mask is that of its own mean loss.
                    gradient[starts] += torch.autograd.grad(of_starts.sum(), chosen)[0]
                totals[starts] += of_starts.detach()
                advance((WITH_GRADIENTS if with_gradients else 1) * n_starts * len(piece))
    return totals, gradient
