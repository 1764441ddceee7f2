"""Training a circuit: sparse masks and optimal-ablation constants together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import MeanMetric

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import Batch
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError
from oa_train.interventions.activations import source_values
from oa_train.interventions.base import scored_logits
from oa_train.interventions.evaluation import circuit_logits
from oa_train.interventions.kinds import AblationKind, AblationSource, check_kind
from oa_train.interventions.nodes import node_logits
from oa_train.masks.base import MaskDistribution, check_threshold
from oa_train.masks.penalties import Penalty, SizePenalty, TargetSize
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES, Loss, check_loss, loss_of, measured
from oa_train.models.loading import BUILT_IN, LMSpec
from oa_train.shapes import Bool, Float, Int, Tensor
from oa_train.tasks.base import Task
from oa_train.training.base import FrozenModelModule
from oa_train.training.sampling import MaskSampler, StepRows


class CircuitModule(FrozenModelModule):
    """Finds the components that do a task, and the constants that replace the others.

    Every step runs the model on a batch of prompts as it is, and again on several copies of each prompt with masks
    drawn anew: a component with mask m passes on m times its value plus (1 - m) times its replacement. The loss is the
    KL divergence of the clean prediction from the masked one, plus the penalty on the number of kept components.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: seeds the mask samples.
        ablation: what replaces an ablated component: `optimal` (constants that are trained), `mean`, `zero`,
            `resample` (its value on another prompt of equal length), `noise` (Gaussian, with its mean and spread),
            `counterfactual_mean`, or `counterfactual` (its value on the prompt's counterfactual).
        loss: `kl`, the divergence from the clean model; `cross_entropy` of the task's answers; `logit_difference` of
            answers against distractors, which is made large.
        positions: size of the constants' table; 1 gives each component one constant, P gives it one for each of the
            positions 0 to P - 2 and one for all later ones. The beginning-of-sequence token is position 0.
        components: a shell pattern, or a list of them, of the components that may be ablated (`a*.h*`, `m*`, `!m0`);
            the others are always kept.
        masks: distribution of the masks.
        penalty: price of a kept component in nats; with a target size the price at the start.
        target_size: how many components the circuit is to have, those that are always kept included; the price is
            then moved until it has them. None keeps the price fixed.
        target_warmup: optimiser steps in which the goal falls from all components to the target size; less than
            half of the training, so that the masks have time to follow.
        samples_per_prompt: mask samples drawn for each prompt of a batch.
        threshold: a component is in the circuit when its keep-probability exceeds this.
        mask_learning_rate: Adam's learning rate of the mask parameters.
        constants_learning_rate: Adam's learning rate of the constants.
        activation_checkpointing: keep only what enters each decoder block and run the block again in the backward
            pass; less memory, more time, the same result.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        *,
        lm: LMSpec = BUILT_IN,
        seed: int = 0,
        ablation: AblationKind = "optimal",
        loss: Loss = "kl",
        positions: int = 1,
        components: str | list[str] = "*",
        masks: Callable[[int], MaskDistribution] = UniformGradientSampling,
        penalty: float = 0.05,
        target_size: float | None = None,
        target_warmup: int = 200,
        samples_per_prompt: int = 4,
        threshold: float = 0.5,
        mask_learning_rate: float = 0.05,
        constants_learning_rate: float = 0.005,
        activation_checkpointing: bool = False,
    ) -> None:
        # Cheap checks come before the model is loaded.
        kind = check_kind("ablation", ablation)
        check_loss("loss", loss)
        _check_positive(positions=positions, samples_per_prompt=samples_per_prompt)
        _check_positive(mask_learning_rate=mask_learning_rate, constants_learning_rate=constants_learning_rate)
        if target_size is not None:
            _check_positive(target_size=target_size, target_warmup=target_warmup)
        self_threshold, size_penalty = check_threshold(threshold), SizePenalty(penalty)
        super().__init__(lm, seed)
        self.threshold = self_threshold
        self.ablation: AblationKind = ablation
        self.kind = kind
        self.loss: Loss = loss
        self.positions = positions
        self.samples_per_prompt = samples_per_prompt
        self.mask_learning_rate = mask_learning_rate
        self.constants_learning_rate = constants_learning_rate
        self.activation_checkpointing = activation_checkpointing
        self.selected = self.components.select([components] if isinstance(components, str) else components)
        if not self.selected:
            raise ConfigurationError(f"components is {components!r}, which selects nothing that could be trained.")
        self.masks = masks(len(self.selected))
        self.sampler = MaskSampler(self.masks, seed, samples_per_prompt)
        self.target_size = target_size
        self.target_warmup = target_warmup
        self.penalty: Penalty = size_penalty
        if target_size is not None:
            self.penalty = TargetSize(
                target_size,
                len(self.selected),
                weight=penalty,
                warmup=target_warmup,
                rate=mask_learning_rate,
                threshold=threshold,
                always_kept=len(self.components) - len(self.selected),
            )
        self.constants: TrainableConstants | None = None
        if kind.constant:
            start = Constants.zeros(self.dimensions, self.bos_token_id, positions)
            self.constants = TrainableConstants([start]).requires_grad_(kind.learned)
        self._other_ablation: Ablation | None = None
        self._prepared_for: Task | None = None
        self._counted: tuple[tuple[int, int], StepRows | None] | None = None
        self.selection: Tensor
        self.register_buffer("selection", self.components.mask(self.selected), persistent=False)
        self.constants_started: Tensor
        self.register_buffer("constants_started", torch.tensor(ablation == "zero"))
        self.evaluated = torch.nn.ModuleDict({name: MeanMetric() for name in MEASURES})

    def describe(self) -> dict[str, Any]:
        """Components, mask distribution, kind of penalty and ablation."""
        return {
            "components": list(self.selected),
            "masks": self.masks.describe(),
            "penalty_kind": type(self.penalty).__name__,
            "ablation": self.ablation,
            "positions": self.positions,
            "loss": self.loss,
        }

    def settings(self) -> dict[str, Any]:
        """Arguments that build this module again, as plain values."""
        return {
            "lm": self.lm_settings(),
            "seed": self.seed,
            "penalty": self.penalty.weight,
            "target_size": self.target_size,
            "target_warmup": self.target_warmup,
            "samples_per_prompt": self.samples_per_prompt,
            "threshold": self.threshold,
            "mask_learning_rate": self.mask_learning_rate,
            "constants_learning_rate": self.constants_learning_rate,
            "activation_checkpointing": self.activation_checkpointing,
            **self.describe(),
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with a group for the masks and one for the constants."""
        # Mask gradients are sparse in time (an entry has one only when a sample falls into its window), hence the
        # longer memory for their second moment.
        masks = {
            "name": "masks",
            "params": list(self.masks.parameters()),
            "lr": self.mask_learning_rate,
            "betas": (0.9, 0.995),
        }
        if self.constants is None or not self.kind.learned:
            return torch.optim.Adam([masks])
        constants = {
            "name": "constants",
            "params": list(self.constants.parameters()),
            "lr": self.constants_learning_rate,
        }
        return torch.optim.Adam([masks, constants])

    def on_train_start(self) -> None:
        """Use this module's learning rates, also where a checkpoint has just brought those of the run before."""
        rates = {"masks": self.mask_learning_rate, "constants": self.constants_learning_rate}
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates[group["name"]]

    def on_fit_start(self) -> None:
        """Prepare the ablation; constants start at the means, unless a checkpoint brought them."""
        self._warn_of_a_short_training()
        self.prepare_ablation()

    def _warn_of_a_short_training(self) -> None:
        if self.target_size is not None and self.planned_steps() < 2 * self.target_warmup:
            rank_zero_warn(
                f"The circuit shrinks to target_size in {self.target_warmup} steps and then settles; this training "
                f"has {self.planned_steps()} steps, so it may end larger. Train for longer, or lower target_warmup."
            )

    def on_validation_start(self) -> None:
        """Prepare the ablation, unless a fit has."""
        self.prepare_ablation()

    def on_test_start(self) -> None:
        """Prepare the ablation."""
        self.prepare_ablation()

    def prepare_ablation(self) -> None:
        """Gather what the ablation needs from the task's `means` prompts, unless a checkpoint brought it."""
        task = self.data.task
        if bool(self.constants_started) if self.constants is not None else self._prepared_for is task:
            return
        prepared = self.kind.prepare(AblationSource(self.frozen, task, self.positions, self.track))
        if self.constants is None:
            self._other_ablation, self._prepared_for = prepared.to(self.device), task
        else:
            assert isinstance(prepared, Constants)
            self.constants.load(prepared)
            self.share_from_first_process(self.constants.parameters())
            self.constants_started.fill_(True)

    def replacing(self) -> Ablation:
        """What replaces ablated components, as trained so far; gradients flow to the constants.

        Raises:
            ConfigurationError: nothing has been fitted, validated or tested, so the ablation is not prepared.
        """
        if self.constants is not None:
            return self.constants.sets()[0]
        if self._other_ablation is None:
            raise ConfigurationError(
                f"The {self.ablation} ablation is prepared with the task's prompts when a trainer fits, validates or "
                "tests; without one, use `KINDS` of oa_train.interventions.kinds."
            )
        return self._other_ablation

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as Lightning does, then let the penalty set the price of the next step."""
        super().optimizer_step(*args, **kwargs)
        self.penalty.update(self.masks)

    def sample_masks(self, batch: Batch, step: StepRows | None = None) -> Float[Tensor, "row component"]:
        """Draw masks over all components for every prompt; those that are not selected are kept.

        A prompt's masks follow from the seed and its number, however prompts are shared out to batches and processes.

        Args:
            batch: B prompts.
            step: rows that gradients are averaged over; those of this batch when not given.

        Returns:
            S * B rows, laid out as `batch.repeat(S)` lays out the prompts, S being `samples_per_prompt`.
        """
        drawn = self.sampler.draw(batch.example_ids, step)
        kept = torch.ones(len(drawn), len(self.components), device=drawn.device, dtype=drawn.dtype)
        return kept.masked_scatter(self.selection, drawn)

    def _rows_of_step(self, batch: Batch, batch_idx: int) -> StepRows | None:
        """Rows that carry gradient in all batches and processes of the optimiser step that this batch belongs to."""
        trainer = self.trainer
        together, n_processes = self.batches_of_step(batch_idx), trainer.world_size
        if len(together) == 1 and n_processes == 1:
            return None
        key = (self.current_epoch, together.start)
        if self._counted is None or self._counted[0] != key:
            numbers = [batch.example_ids + (i - batch_idx) * n_processes * len(batch) for i in together]
            summed = partial(trainer.strategy.reduce, reduce_op="sum")
            self._counted = key, self.sampler.rows_of_step(numbers, summed, n_processes)
        return self._counted[1]

    @torch.no_grad()
    def clean_logits(self, batch: Batch) -> Float[Tensor, "batch scored vocabulary"]:
        """What the unablated model predicts."""
        return scored_logits(self.frozen, batch)

    def masked_loss(
        self, batch: Batch, clean: Float[Tensor, "batch scored vocabulary"], step: StepRows | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss under sampled masks, and the penalty; their sum is what training minimises.

        Args:
            batch: prompts.
            clean: what the unablated model predicts for them.
            step: rows that mask gradients are averaged over; those of this batch when not given.
        """
        rows = batch.repeat(self.samples_per_prompt)
        mask = self.sample_masks(batch, step)
        replacements = self.replacing().replacements(batch, partial(source_values, self.frozen))
        laid_out, recompute = replacements.repeat(self.samples_per_prompt), self.activation_checkpointing
        logits = node_logits(self.frozen, rows, mask, laid_out, self.bos_token_id, recompute)
        lost = loss_of(self.loss, clean.repeat(self.samples_per_prompt, 1, 1), logits, rows).mean()
        return lost, self.penalty(self.masks)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; see `masked_loss`."""
        lost, penalty = self.masked_loss(batch, self.clean_logits(batch), self._rows_of_step(batch, batch_idx))
        loss: Tensor = lost + penalty
        measure, mean = f"train/{self.loss}", self.over_processes(lost)
        self.check_finite({measure: mean, "train/penalty": penalty.detach()}, "Parts of the loss")
        size = self.masks.expected_size().detach() + len(self.components) - len(self.selected)
        figures = {
            measure: LOSS_SIGNS[self.loss] * mean,
            "train/penalty": penalty.detach(),
            "train/price": self.penalty.price,
            "train/size": size,
        }
        self.log("train/loss", mean + penalty.detach(), prog_bar=True, batch_size=len(batch))
        self.log_dict(figures, batch_size=len(batch))
        return loss * self.share_of_step(batch_idx)

    @torch.no_grad()
    def circuit_mask(self) -> Bool[Tensor, " component"]:
        """The thresholded mask over all components."""
        mask = ~self.selection
        mask[self.selection] = self.masks.threshold(self.threshold)
        return mask

    @torch.no_grad()
    def keep_probability(self) -> Float[Tensor, " component"]:
        """Keep-probability of every component; 1 for those that are not selected."""
        probability = torch.ones(len(self.components), device=self.selection.device)
        probability[self.selection] = self.masks.keep_probability().float()
        return probability

    def circuit(self) -> Circuit:
        """The thresholded circuit."""
        mask, scores = self.circuit_mask().cpu(), self.keep_probability().cpu()
        provenance = self.provenance() | {
            "ablation": self.ablation,
            "loss": self.loss,
            "selected": list(self.selected),
            "training": {name: value for name, value in self.settings().items() if name not in ("lm", "seed")},
        }
        return Circuit.from_mask(self.components, mask, scores, provenance)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate the thresholded circuit."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate the thresholded circuit."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        mask = self.circuit_mask()
        clean = self.clean_logits(batch)
        logits = circuit_logits(self.frozen, batch, mask.unsqueeze(0), [self.replacing()])
        for name in MEASURES:
            average = self._average(name)
            average.update(measured(name, clean, logits, batch))
            self.log(f"{stage}/{name}", average, prog_bar=name == "kl", batch_size=len(batch))

    def _average(self, name: str) -> MeanMetric:
        average = self.evaluated[name]
        assert isinstance(average, MeanMetric)
        return average

    def on_validation_epoch_end(self) -> None:
        """Log the size, and what the best checkpoint minimises."""
        size = self._log_size("val")
        loss = LOSS_SIGNS[self.loss] * self._average(self.loss).compute()
        self.log("val/objective", self.penalty.objective(loss, size), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the size."""
        self._log_size("test")

    def _log_size(self, stage: str) -> Int[Tensor, ""]:
        size = self.circuit_mask().sum()
        self.log(f"{stage}/size", size.float(), prog_bar=True, sync_dist=True)
        return size


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigurationError(f"{name} is {value}; expected more than 0.")
