"""Training the constants of fixed circuits, any number of them side by side.

Each circuit has constants of its own and each step shows all circuits the same prompts, as copies in one batch. The
circuits do not touch each other, so this equals training them one after another. Circuits that ablate nothing in
common, each component alone for instance, have theirs in one table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import Batch
from oa_train.errors import ConfigurationError, NotFiniteError
from oa_train.engine.forward import scored_logits
from oa_train.ablations.evaluation import ROWS_PER_RUN, circuit_behaviour, circuit_logits
from oa_train.engine.levels import replaced_sources, rows_within_memory
from oa_train.metrics.measures import Loss, loss_of
from oa_train.models.loading import CausalLM
from oa_train.progress import Track, silent
from oa_train.shapes import Bool, Float, Tensor
from oa_train.tasks.task import Task
from oa_train.ablations.best import BestConstants, share_a_table


@dataclass(frozen=True)
class RefitSettings:
    """How constants of a fixed circuit are trained.

    Attributes:
        steps: steps of Adam; 0 keeps the best of the starts.
        batch_size: prompts of a step, shared by all circuits.
        learning_rate: of Adam at the start; it falls to zero along a cosine.
        evaluate_every: steps between two looks at the validation prompts; the best seen is kept.
        rows_per_run: most rows (circuits times prompts) of one model run; bounds memory, changes no result.
    """

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 0.01
    evaluate_every: int = 25
    rows_per_run: int = ROWS_PER_RUN

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigurationError(f"steps is {self.steps}; expected 0 or more.")
        for name in ("batch_size", "learning_rate", "evaluate_every", "rows_per_run"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; expected more than 0.")


@dataclass(frozen=True, eq=False)
class FittedConstants:
    """Constants of each circuit, the best seen by validation.

    Attributes:
        sets: the constants of each circuit; one table for all if no two ablate the same component.
        validation_loss: their loss on the validation prompts, in nats.
    """

    sets: list[Constants]
    validation_loss: Float[Tensor, " circuit"]


def fit_constants(
    model: CausalLM,
    task: Task,
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
        task: prompts; steps draw from its `refit` stream, the best is chosen on its `validation` stream.
        masks: a circuit in each row.
        starts: constants where training starts, of each circuit or one for all.
        settings: steps, learning rate and so on.
        loss: what is minimised.
        others: constants that are kept instead wherever they do better (zero or mean ablation, say), so that the
            result is never worse on the validation prompts.
        track: progress.
        description: what the progress bar says.

    Raises:
        NotFiniteError: the loss became NaN or infinite.
    """
    replaced = replaced_sources(model, masks)
    n_tables = 1 if len(starts) == 1 and share_a_table(replaced) else len(masks)
    with_inputs = bool(replaced[:, 0].any())
    constants = TrainableConstants([starts[i if len(starts) > 1 else 0] for i in range(n_tables)], with_inputs)
    constants.to(model.device)
    best = BestConstants(replaced, constants)
    batches = list(task.batches("validation", task.n_validation))

    def offer(tables: TrainableConstants) -> None:
        found = circuit_behaviour(model, batches, masks, tables.sets(), settings.rows_per_run)
        best.offer(tables, found.loss(loss).mean(dim=1))

    for candidate in others:
        offer(TrainableConstants([candidate] * n_tables).to(model.device))
    offer(constants)
    optimizer = torch.optim.Adam(constants.parameters(), lr=settings.learning_rate)
    for step in track(range(settings.steps), description):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * falling(step, settings.steps)
        optimizer.zero_grad(set_to_none=True)
        batch = task.batch("refit", step, settings.batch_size).to(model.device)
        losses = _accumulate_gradient(model, batch, masks, constants, loss, settings.rows_per_run)
        if not torch.isfinite(losses).all():
            raise NotFiniteError(
                f"The loss of the constants is {losses.tolist()} at step {step} of the refit, which is not finite. "
                "Lower its learning rate."
            )
        optimizer.step()
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            offer(constants)
    return FittedConstants(best.sets(), best.loss.cpu())


def falling(step: int, n_steps: float) -> float:
    """Share of a learning rate that falls to zero along a cosine.

    Args:
        step: number of the step.
        n_steps: steps until zero.
    """
    return 0.5 * (1 + math.cos(math.pi * min(step / n_steps, 1.0)))


def circuit_losses(
    model: CausalLM,
    batch: Batch,
    clean: Float[Tensor, "batch scored vocabulary"],
    masks: Bool[Tensor, "circuit entry"],
    sets: Sequence[Constants],
    loss: Loss,
    recompute: bool = False,
) -> Float[Tensor, " circuit"]:
    """Mean loss of each circuit over the prompts, in one run of the model, with gradients to the constants.

    Args:
        model: frozen causal language model.
        batch: prompts.
        clean: what the unablated model predicts for them.
        masks: a circuit in each row.
        sets: the constants of each, or one table for all.
        loss: what is minimised.
        recompute: see `scored_logits`.
    """
    logits = circuit_logits(model, batch, masks, sets, recompute)
    lost = loss_of(loss, clean.repeat(len(masks), 1, 1), logits, batch.repeat(len(masks)))
    return lost.view(len(masks), -1).mean(dim=1)


def _accumulate_gradient(
    model: CausalLM, batch: Batch, masks: Tensor, constants: TrainableConstants, loss: Loss, rows_per_run: int
) -> Float[Tensor, " circuit"]:
    most = rows_within_memory(model, batch, masks.shape[1], gradients=True)
    total = torch.zeros(len(masks), device=model.device)
    for part in batch.pieces(most):
        with torch.no_grad():
            clean = scored_logits(model, part)
        at_once, share = max(1, min(rows_per_run, most) // len(part)), len(part) / len(batch)
        for start in range(0, len(masks), at_once):
            some, sets = slice(start, start + at_once), constants.sets()
            losses = circuit_losses(model, part, clean, masks[some], sets if len(sets) == 1 else sets[some], loss)
            # A sum over circuits: each circuit's gradient is that of its own mean, however many run beside it.
            (share * losses.sum()).backward()
            total[some] += share * losses.detach()
    return total
