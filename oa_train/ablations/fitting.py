"""Training the constants of fixed circuits, any number of them in parallel.

Each circuit has its own constants, and each step runs all circuits on the same prompts, as copies in one batch. The
circuits are independent, so this equals training them one after another. Circuits that ablate disjoint sets of units,
such as each component alone, share one set of tables.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from oa_train.ablations.base import replacements_of_copies
from oa_train.ablations.best_constants import BestConstants, can_share_tables, replaced_slots
from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.ablations.evaluation import CleanLogits, circuit_behaviour
from oa_train.batches import Batch
from oa_train.checks import check_at_least, check_positive
from oa_train.engine.chunks import ROWS_PER_RUN, chunks
from oa_train.engine.levels import copies_and_clean_logits
from oa_train.engine.reading import read_values
from oa_train.errors import NotFiniteError
from oa_train.metrics.measures import Loss, loss_of
from oa_train.models.frozen import CausalLM
from oa_train.models.levels import Level
from oa_train.progress import WITH_GRADIENTS, Advance, Track, silent
from oa_train.shapes import Bool, Float, Tensor
from oa_train.tasks.task import Task

# Least relative decrease of the loss that counts as an improvement.
NOTICEABLE = 0.01


@dataclass(frozen=True)
class RefitSettings:
    """Settings of the training of constants for fixed circuits.

    Attributes:
        steps: steps of Adam; 0 keeps the best of the initial constants.
        batch_size: prompts of a step, shared by all circuits.
        learning_rate: Adam's initial learning rate, with cosine decay to zero.
        evaluate_every: steps between evaluations on the validation prompts; the best constants are kept.
        patience: evaluations in a row that lower a circuit's loss by less than 1 %, after which the training of its
            constants stops; 0 never stops early.
        rows_per_run: most rows (circuits times prompts) of one model run; limits memory, not results.
    """

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 0.01
    evaluate_every: int = 25
    patience: int = 0
    rows_per_run: int = ROWS_PER_RUN

    def __post_init__(self) -> None:
        check_at_least(0, steps=self.steps, patience=self.patience)
        check_at_least(1, batch_size=self.batch_size, evaluate_every=self.evaluate_every)
        check_at_least(1, rows_per_run=self.rows_per_run)
        check_positive(learning_rate=self.learning_rate)


class FittedCircuits(nn.Module):
    """Fixed circuits, the constants trained for them, and their best constants so far; see `fit_constants`."""

    def __init__(
        self,
        level: Level,
        masks: Bool[Tensor, "circuit entry"],
        starts: Sequence[Constants],
        loss: Loss,
        rows_per_run: int = ROWS_PER_RUN,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.level, self.loss, self.rows_per_run, self.recompute = level, loss, rows_per_run, recompute
        self.masks = nn.Buffer(masks, persistent=False)
        # Constants for edges include those of the embedding, which is not a node.
        starts = [start.of_level(level) for start in starts]
        replaced = replaced_slots(level, masks, starts[0].slots)
        shared = len(starts) == 1 and can_share_tables(replaced)
        n_sets = 1 if shared else len(masks)
        trained = [site for site, units in replaced.items() if bool(units.any())]
        self.constants = TrainableConstants([starts[n if len(starts) > 1 else 0] for n in range(n_sets)], trained)
        self.best = BestConstants(replaced, self.constants)

    @property
    def has_constants(self) -> bool:
        """True if there are constants to train: a circuit replaces some unit."""
        return any(table.requires_grad for table in self.constants.parameters())

    def candidate(self, constants: Constants) -> TrainableConstants:
        """The same constants for every circuit, not trained, as an alternative to the trained ones."""
        sets = [constants.of_level(self.level)] * len(self.constants)
        return TrainableConstants(sets).to(self.constants.device).requires_grad_(False)

    def runs(self, model: CausalLM, batch: Batch, circuits: Sequence[int] | None = None) -> Iterator["CircuitRun"]:
        """Model runs of one step of all or some circuits on a batch, each within `rows_per_run` rows and memory."""
        circuits = range(len(self.masks)) if circuits is None else circuits
        masks = self.masks[[*circuits]]
        for piece, slices in chunks(model, self.level, batch, masks, self.rows_per_run, gradients=True):
            clean: list[Tensor] = []
            for chosen in slices:
                yield CircuitRun(self, model, piece, [*circuits[chosen]], len(piece) / len(batch), clean)


@dataclass(frozen=True, eq=False)
class CircuitRun:
    """One run of a model in a training step of constants: some of the circuits on a share of the step's prompts."""

    fitted: FittedCircuits
    model: CausalLM
    batch: Batch
    circuits: list[int]
    share: float
    # Clean logits of these prompts, once a run of some of the circuits has computed them.
    clean: list[Float[Tensor, "batch scored vocabulary"]]

    def losses(self) -> Float[Tensor, " circuit"]:
        """The run's share of each circuit's mean loss over the step's prompts, with gradients to its constants."""
        fitted, n_circuits = self.fitted, len(self.circuits)
        sets = fitted.constants.sets(self.circuits)
        values = replacements_of_copies(
            sets, self.batch, n_circuits, partial(read_values, self.model, level=fitted.level)
        )
        masks = fitted.masks[self.circuits]
        logits, clean = copies_and_clean_logits(
            self.model, self.batch, fitted.level, masks, values, fitted.recompute, *self.clean
        )
        self.clean[:] = [clean]
        losses = loss_of(fitted.loss, clean, logits, self.batch.repeat(n_circuits))
        return self.share * losses.view(n_circuits, -1).mean(dim=1)


@dataclass(frozen=True, eq=False)
class FittedConstants:
    """Best constants of each circuit, or one set for all if no two ablate the same unit, and their loss in nats."""

    sets: list[Constants]
    validation_loss: Float[Tensor, " circuit"]


def fit_constants(
    model: CausalLM,
    task: Task,
    level: Level,
    masks: Bool[Tensor, "circuit entry"],
    starts: Sequence[Constants],
    settings: RefitSettings,
    *,
    loss: Loss = "kl",
    others: Sequence[Constants] = (),
    track: Track = silent,
    description: str = "fitting constants",
) -> FittedConstants:
    """Train optimal-ablation constants for fixed circuits.

    Args:
        model: frozen causal language model.
        task: prompts; steps draw from its `refit` stream, the best constants are chosen on its `validation` stream.
        level: level of the masks.
        masks: a circuit in each row.
        starts: initial constants of each circuit, or one set for all.
        settings: steps, learning rate and so on; circuits that replace nothing are not trained.
        loss: name of the loss.
        others: alternatives, such as zeros or means, that are kept for a circuit if they do better on the validation
            prompts, so the result is never worse on those prompts.
        track: progress.
        description: text of the progress bar.

    Raises:
        NotFiniteError: the loss became NaN or infinite.
    """
    fitted = FittedCircuits(level, masks, starts, loss, settings.rows_per_run).to(model.device)
    others = candidates(starts, others)
    if not fitted.has_constants:
        settings = replace(settings, steps=0)
    passes = fit_passes(len(masks), settings, task.n_validation, len(others))
    done = 0
    with track(passes, description) as advance:

        def count(more: int) -> None:
            nonlocal done
            done += more
            advance(more)

        _fit(model, task, fitted, settings, others, count)
        advance(passes - done)  # passes of circuits whose training stopped early
    return FittedConstants(fitted.best.sets(), fitted.best.loss.cpu())


def candidates(starts: Sequence[Constants], others: Sequence[Constants]) -> list[Constants]:
    """The other constants without the common start, which is evaluated anyway."""
    return [constants for constants in others if any(start is not constants for start in starts)]


def fit_passes(n_circuits: int, settings: RefitSettings, n_validation: int, n_others: int) -> int:
    """Passes of `fit_constants`, counted as in `progress`."""
    n_offers = n_others + 1 + math.ceil(settings.steps / settings.evaluate_every)
    return n_circuits * (n_offers * n_validation + WITH_GRADIENTS * settings.steps * settings.batch_size)


def _fit(
    model: CausalLM,
    task: Task,
    fitted: FittedCircuits,
    settings: RefitSettings,
    others: Sequence[Constants],
    advance: Advance,
) -> None:
    validation, clean = list(task.batches("validation", task.n_validation)), CleanLogits(model)
    stagnation = torch.zeros(len(fitted.masks), dtype=torch.long)
    active = [*range(len(fitted.masks))]

    def offer(tables: TrainableConstants) -> Float[Tensor, " circuit"]:
        """Offer these constants for the active circuits; returns each circuit's best loss before the offer."""
        before, loss = fitted.best.loss.cpu(), torch.full_like(stagnation, torch.inf, dtype=torch.float)
        masks, sets = fitted.masks[active], tables.sets(active)
        behaviour = circuit_behaviour(
            model, validation, fitted.level, masks, sets, fitted.rows_per_run, clean, advance
        )
        loss[active] = behaviour.loss(fitted.loss).mean(dim=1).float()
        fitted.best.offer(tables, loss)
        return before

    for constants in others:
        offer(fitted.candidate(constants))
    offer(fitted.constants)
    optimizer = torch.optim.Adam(fitted.constants.parameters(), lr=settings.learning_rate)
    n_steps = settings.steps
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * cosine_decay(step, n_steps)
        optimizer.zero_grad(set_to_none=True)
        batch = task.batch("refit", step, settings.batch_size).to(model.device)
        total = torch.zeros(len(fitted.masks), device=model.device)
        for run in fitted.runs(model, batch, active):
            losses = run.losses()
            # A sum over circuits: each circuit's gradient is that of its own mean, however many run together.
            losses.sum().backward()
            total[run.circuits] += losses.detach()
            advance(WITH_GRADIENTS * len(losses) * len(run.batch))
        if not torch.isfinite(total).all():
            raise NotFiniteError(
                f"The loss of the constants is {total.tolist()} at step {step} of the refit, which is not finite. "
                "Lower its learning rate."
            )
        optimizer.step()
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == n_steps:
            before = offer(fitted.constants)
            # A logit difference may have any sign.
            improved = before - fitted.best.loss.cpu() > NOTICEABLE * before.abs()
            stagnation = torch.where(improved, 0, stagnation + 1)
            if settings.patience:
                active = (stagnation < settings.patience).nonzero().flatten().tolist()
            if not active:
                break


def cosine_decay(step: int, n_steps: float) -> float:
    """Factor of cosine decay from 1 to 0 in `n_steps`."""
    return 0.5 * (1 + math.cos(math.pi * min(step / n_steps, 1.0)))
