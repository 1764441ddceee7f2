"""Training of circuits: sparse masks and optimal-ablation constants together."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from oa_train.ablations.base import replacements_of_copies
from oa_train.ablations.evaluation import circuit_logits
from oa_train.ablations.registry import AblationName, AblationSource, check_kind
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.batches import Batch
from oa_train.checks import check_positive
from oa_train.circuits.circuit import Circuit
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.engine.reading import read_values
from oa_train.errors import ConfigurationError
from oa_train.masks.base import MaskDistribution, check_threshold
from oa_train.masks.penalty import smooth_size
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES, Loss, check_loss, loss_of, measured
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.levels import Level
from oa_train.models.sites import DEFAULT_SITES, check_dictionaries
from oa_train.models.spec import BUILT_IN, LMSpec
from oa_train.shapes import Bool, Float, Tensor
from oa_train.training.circuit_masks import CircuitMasks, LevelKind, StepRows, check_level, level_of
from oa_train.training.metric_averages import CircuitMeans, each_and_mean
from oa_train.training.module import FrozenModelModule
from oa_train.training.optimizers import LRSchedulerCallable, OptimizerCallable
from oa_train.training.penalties import PenaltySettings, PenaltyWeight
from oa_train.training.replacements import Replacements
from oa_train.training.settings import as_list
from oa_train.training.steps import batches_of_step, planned_steps, share_of_step
from oa_train.training.strategies import ShardedStrategy, share_from_first_process


class CircuitModule(FrozenModelModule):
    """Finds the units of a model, or the edges between its components, that do a task, and constants for all others.

    Every step runs the clean model on a batch of prompts, then several copies of each prompt with freshly drawn masks:
    a unit with mask m outputs m times its value plus (1 - m) times its replacement; an edge with mask m passes this
    mixture to its reader alone. The loss is the KL divergence of the clean prediction from the masked one, plus the
    penalty on the number of kept units or edges.

    Several circuits, each with its own penalty weight or target size, masks and constants, are trained side by side on
    the same prompts. They interact only if gradients are clipped, because the norm is taken over all of them.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: seeds the mask samples.
        level: `nodes`, units of the chosen sites, or `edges` from what writes to the residual stream to what reads
            it: queries, keys and values of heads, MLPs, and the logits.
        sites: kinds of site whose units are the nodes: `heads`, `mlp`, `attention`, `neurons`, `residual`,
            `embedding`, `tokens`, `features`.
        dictionaries: sparse autoencoders, whose features are the units of the kind `features`.
        ablation: replacement of an ablated unit: `optimal` (constants that are trained), `mean`, `mean_by_position`,
            `zero`, `resample` (its value on another prompt of equal length), `noise` (Gaussian, with the unit's mean
            and standard deviation), `counterfactual_mean`, or `counterfactual` (its value on the counterfactual).
        loss: `kl`, the divergence from the clean model; `cross_entropy` of the task's answers; `logit_difference` of
            answers against distractors, which is maximised.
        positions: size of the constants' tables; 1 gives each unit one constant, P gives it one for each of the
            positions 0 to P - 2 and one for all later ones. The beginning-of-sequence token is position 0.
        components: shell patterns of the units that may be ablated (`a*.h*`, `m*`, `!m0`), also at a span alone
            (`m*@S2`, `r2@-1`), or of the edges that may be cut (`a*.h*->logits`, `input->*<v>`; without an arrow all
            edges from a component). All others are kept, except edges that then lead nowhere.
        masks: distribution of the masks.
        penalty_weight: price of a kept unit or edge in nats; with a target size, the initial weight. A list trains a
            circuit for each weight, side by side; a mapping has a weight for each kind of site.
        node_penalty: for edges, a surcharge on those of heads with few edges, as a fraction of the penalty weight;
            above 0, heads with few edges tend to lose them all.
        target_size: number of units or edges in the circuit, including those that are always kept: the penalty weight
            is adjusted until about this many are kept, and the circuit has exactly this many, those with the highest
            keep-probability (fewer edges, if others would dangle). None fixes the weight; a list has one per circuit.
        target_warmup: optimiser steps in which the goal falls from all units or edges to the target size; less than
            half of the training, so that the masks have time to follow.
        samples_per_prompt: number of masks drawn for each prompt of a batch.
        threshold: without a target size, a unit or edge with a keep-probability above this is in the circuit; dangling
            edges are removed.
        mask_learning_rate: learning rate of the mask parameters; the initial one if there is a schedule.
        constants_learning_rate: learning rate of the constants.
        optimizer: class of the optimiser, with its arguments except `lr`; by default Adam, with a second beta of
            0.995 for the masks.
        lr_scheduler: class of a schedule of both rates, with its arguments; constant by default. It is stepped after
            every optimiser step, `ReduceLROnPlateau` after every epoch.
        recompute: activation checkpointing of each decoder block; less memory, more time, the same result.

    Raises:
        ConfigurationError, ArtefactError, ModelError: an argument cannot work, or names a dictionary or model that
            cannot be read.
    """

    def __init__(
        self,
        *,
        lm: LMSpec = BUILT_IN,
        seed: int = 0,
        level: LevelKind = "nodes",
        sites: list[str] = [*DEFAULT_SITES],  # noqa: B006 (never changed; jsonargparse shows a default of None badly)
        dictionaries: list[DictionarySpec] | None = None,
        ablation: AblationName = "optimal",
        loss: Loss = "kl",
        positions: int = 1,
        components: str | list[str] = "*",
        masks: Callable[[int], MaskDistribution] = UniformGradientSampling,
        penalty_weight: PenaltyWeight = 0.05,
        node_penalty: float = 0.0,
        target_size: float | list[float] | None = None,
        target_warmup: int = 200,
        samples_per_prompt: int = 4,
        threshold: float = 0.5,
        mask_learning_rate: float = 0.05,
        constants_learning_rate: float = 0.005,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        recompute: bool = False,
    ) -> None:
        arguments = dict(locals())
        # Cheap checks are made before the model is loaded.
        check_kind("ablation", ablation)
        check_level(level, node_penalty, sites)
        check_loss("loss", loss)
        check_positive(positions=positions, samples_per_prompt=samples_per_prompt)
        check_positive(mask_learning_rate=mask_learning_rate, constants_learning_rate=constants_learning_rate)
        check_threshold(threshold)
        penalties = PenaltySettings(penalty_weight, node_penalty, target_size, target_warmup)
        patterns = as_list(components)
        check_dictionaries(sites, len(dictionaries or []))
        loaded = [spec.load() for spec in dictionaries or []]
        super().__init__(arguments, optimizer, lr_scheduler)
        self.loss: Loss = loss
        self.mask_learning_rate, self.constants_learning_rate = mask_learning_rate, constants_learning_rate
        self.recompute, self.penalties = recompute, penalties
        self.n_circuits = penalties.n_circuits
        self.masks = CircuitMasks(
            level_of(level, self.frozen.config, sites, patterns, loaded),
            patterns,
            masks,
            n_circuits=self.n_circuits,
            threshold=threshold,
            seed=seed,
            samples_per_prompt=samples_per_prompt,
        )
        self.level: Level = self.masks.level
        self.ablation, self.positions = ablation, positions
        self.penalty = penalties.make(self.masks, mask_learning_rate)
        self.replacements = Replacements(ablation, self.level, positions, self.n_circuits, self.masks.selection)
        self._counted: tuple[tuple[int, int], StepRows | None] | None = None
        self._evaluated = CircuitMeans(len(MEASURES), self.n_circuits)
        self._discrete: Tensor

    def describe(self) -> dict[str, Any]:
        """Level, components, mask distribution, kind of penalty, ablation and loss."""
        return {
            **self.masks.describe(),
            "penalty_kind": type(self.penalty).__name__,
            "ablation": self.ablation,
            "positions": self.positions,
            "loss": self.loss,
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for the masks and one for the constants."""
        masks = {"name": "masks", "params": list(self.masks.parameters()), "lr": self.mask_learning_rate}
        if self.optimizer is None:
            # Mask gradients are sparse in time: an entry has one only if a sample falls into its window.
            masks["betas"] = (0.9, 0.995)
        constants = [p for p in self.replacements.parameters() if p.requires_grad]
        return [masks, {"name": "constants", "params": constants, "lr": self.constants_learning_rate}]

    def configure_model(self) -> None:
        """Shard the model (see `FrozenModelModule.configure_model`); circuits of edges are refused."""
        if not self.level.has_one_stream and isinstance(self.trainer.strategy, ShardedStrategy):
            raise ConfigurationError(
                "The strategy fsdp frees the gathered weights of a block once it has run, and gradients of edges need "
                "them again. Train circuits of nodes under it, or edges with --trainer.strategy ddp and "
                "--lm.dtype bfloat16."
            )
        super().configure_model()

    def on_fit_start(self) -> None:
        """Prepare the ablation; constants start at the means, unless a checkpoint restored them."""
        warmup = self.penalties.target_warmup
        steps = planned_steps(self.trainer, self.data.epoch_length)
        if self.penalties.target_size is not None and steps < 2 * warmup:
            rank_zero_warn(
                f"The circuit shrinks to target_size in {warmup} steps and then settles; this training has "
                f"{steps} steps, so it may end larger. Train for longer, or lower target_warmup."
            )
        self.prepare_ablation()

    def prepare_ablation(self) -> None:
        """Prepare the ablation with the task's `means` prompts, unless a checkpoint restored it."""
        task = self.data.task
        if not self.replacements.is_prepared_for(task):
            self.replacements.prepare(AblationSource(self.frozen, task, self.level, self.positions, self.track))
            share_from_first_process(self.replacements.parameters())

    on_validation_start = on_test_start = on_predict_start = prepare_ablation

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as Lightning does, then let the penalty set the weight of the next step."""
        super().optimizer_step(*args, **kwargs)
        if self.penalties.target_size is not None:  # else the weight is fixed, and sizes are not needed
            with torch.no_grad():
                sizes = self.masks.priced(self.masks.discrete()).sum(dim=1) + self.masks.n_fixed
                self.penalty.update(smooth_size(self.masks.probabilities(), self.masks.threshold), sizes)

    def discrete(self) -> Bool[Tensor, "circuit entry"]:
        """The discrete circuits: of the target sizes if there are any, else all entries above the threshold."""
        masks = [self.masks.largest(number, size) for number, size in enumerate(self.penalties.target_sizes)]
        return torch.stack(masks).to(self.masks.selection.device) if masks else self.masks.discrete()

    def _rows_of_step(self, batch: Batch, batch_idx: int) -> StepRows | None:
        """Rows that carry gradient in this batch's optimiser step, over all its batches and processes."""
        together = batches_of_step(self.trainer, self.data.epoch_length, batch_idx)
        n_processes = self.trainer.world_size
        if len(together) == 1 and n_processes == 1:
            return None
        key = (self.current_epoch, together.start)
        if self._counted is None or self._counted[0] != key:
            ids = [batch.example_ids + (number - batch_idx) * n_processes * len(batch) for number in together]
            summed = partial(self.trainer.strategy.reduce, reduce_op="sum")
            self._counted = key, self.masks.rows_of_step(ids, summed, n_processes)
        return self._counted[1]

    @torch.no_grad()
    def clean_logits(self, batch: Batch) -> Float[Tensor, "batch scored vocabulary"]:
        """Logits of the unablated model."""
        return scored_logits(self.frozen, batch)

    def masked_loss(
        self, batch: Batch, clean: Float[Tensor, "batch scored vocabulary"], step: StepRows | None = None
    ) -> tuple[Float[Tensor, " circuit"], Float[Tensor, " circuit"]]:
        """Each circuit's loss under sampled masks, and its penalty; training minimises the sum of all.

        Mask gradients are averaged over the rows of `step`, by default over those of this batch.
        """
        samples = self.masks.samples_per_prompt
        copies = self.n_circuits * samples
        rows, mask = batch.repeat(copies), self.masks.sample(batch.example_ids, step)
        ablations = self.replacements.ablations()
        of_copies = ablations if len(ablations) == 1 else [ablation for ablation in ablations for _ in range(samples)]
        values = replacements_of_copies(of_copies, batch, copies, partial(read_values, self.frozen, level=self.level))
        logits = masked_logits(self.frozen, rows, self.level, mask, values, self.recompute)
        losses = loss_of(self.loss, clean, logits, rows)
        return losses.view(self.n_circuits, -1).mean(dim=1), self.penalty(self.masks.probabilities())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the circuits' losses and penalties; see `masked_loss`."""
        losses, penalty = self.masked_loss(batch, self.clean_logits(batch), self._rows_of_step(batch, batch_idx))
        measure, means, penalties = f"train/{self.loss}", self.over_processes(losses), penalty.detach()
        self.check_finite({measure: means, "train/penalty": penalties}, "Parts of the loss", batch)
        figures = {
            measure: LOSS_SIGNS[self.loss] * means,
            "train/penalty": penalties,
            "train/penalty_weight": self.penalty.weight.expand(self.n_circuits),
            "train/size": self.masks.probabilities().detach().sum(dim=1) + self.masks.n_fixed,
        }
        self.log("train/loss", (means + penalties).mean(), prog_bar=True, batch_size=len(batch))
        for name, value in each_and_mean(figures).items():
            self.log(name, value, prog_bar=name in (measure, "train/size"), batch_size=len(batch))
        # A sum, so that a circuit's gradient is that of its own loss, however many run together.
        return (losses + penalty).sum() * share_of_step(self.trainer, self.data.epoch_length, batch_idx)

    def trained_circuits(self, size: int | None = None) -> list[TrainedCircuit]:
        """The discrete circuits (see `circuit`) with the constants that were trained together with the masks."""
        table = self.replacements.constants
        circuits = [self.circuit(number, size) for number in range(self.n_circuits)]
        if table is None:
            return [TrainedCircuit(str(number), circuit, None) for number, circuit in enumerate(circuits)]
        return [
            TrainedCircuit(str(number), circuit, replace(own.detach().to("cpu"), provenance=circuit.provenance))
            for number, (circuit, own) in enumerate(zip(circuits, table.sets(), strict=True))
        ]

    def circuit(self, number: int = 0, size: int | None = None) -> Circuit:
        """A discrete circuit.

        Args:
            number: index in the list of penalty weights or target sizes.
            size: number of entries of the circuit, those with the highest keep-probability; by default the target
                size and, without one, all entries above the threshold.

        Raises:
            ConfigurationError: see `CircuitMasks.check_size`.
        """
        scores, removed = self.masks.keep_probability()[number].cpu(), {}
        if size is None and self.penalties.target_sizes:
            size = self.penalties.target_sizes[number]
        if size is not None:
            mask = self.masks.largest(number, size)
        else:
            mask = self.masks.discrete()[number].cpu()
            if not self.level.has_one_stream:
                removed = {"edges_before_removal": int(self.masks.above_threshold()[number].sum())}
        settings = {name: value for name, value in self.settings().items() if name not in ("lm", "seed")}
        provenance = {
            **self.provenance(),
            **removed,
            "ablation": self.ablation,
            "loss": self.loss,
            "selected": self.masks.selected,
            "training": settings | self.penalties.of_circuit(number) | {"masks": self.describe()["masks"]},
        }
        return Circuit.from_mask(self.level, mask, scores, provenance)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate the discrete circuits."""
        clean, rows = self.clean_logits(batch), batch.repeat(self.n_circuits)
        if batch_idx == 0:
            # Taken now, because a weight-averaging callback swaps the weights back before the validation ends.
            self._discrete = self.discrete()
        logits = circuit_logits(self.frozen, batch, self.level, self._discrete, self.replacements.ablations())
        values = torch.stack([measured(name, clean, logits, rows).view(self.n_circuits, -1) for name in MEASURES])
        self._evaluated.update(values.mean(dim=2), len(batch))

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, "circuit prompt scored vocabulary"]:
        """Logits of the discrete circuits at the scored positions; `trainer.predict` runs the test prompts."""
        logits = circuit_logits(self.frozen, batch, self.level, self.discrete(), self.replacements.ablations())
        return logits.view(self.n_circuits, len(batch), *logits.shape[1:])

    def _log_evaluation(self, stage: str) -> dict[str, Tensor]:
        """Log the measures and sizes of all circuits; returns them."""
        figures = {"size": self._discrete.sum(dim=1), **dict(zip(MEASURES, self._evaluated.taken(), strict=True))}
        shown = each_and_mean({f"{stage}/{name}": values for name, values in figures.items()})
        for name, value in shown.items():
            self.log(name, value, prog_bar=name in (f"{stage}/kl", f"{stage}/size"), sync_dist=True)
        return figures

    def on_validation_epoch_end(self) -> None:
        """Log the measures, the sizes, and the objective that the best checkpoint minimises."""
        figures = self._log_evaluation("val")
        loss, kept = LOSS_SIGNS[self.loss] * figures[self.loss], self.masks.priced(self._discrete)
        objective = self.penalty.objective(loss, kept, self.masks.n_fixed)
        self.log("val/objective", objective.mean(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the measures and the sizes."""
        self._log_evaluation("test")
