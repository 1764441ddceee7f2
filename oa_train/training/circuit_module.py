"""Training a circuit: sparse masks and optimal-ablation constants together."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn

from oa_train.ablations.base import Ablation, replacements_of_copies
from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import Batch
from oa_train.circuits.circuit import Circuit
from oa_train.models.pruning import highest_circuit, without_dangling
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.engine.reading import source_values
from oa_train.engine.forward import scored_logits
from oa_train.ablations.evaluation import circuit_logits
from oa_train.ablations.registry import AblationKind, AblationSource, check_kind
from oa_train.engine.levels import masked_logits
from oa_train.masks.base import MaskDistribution, check_threshold
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES, Loss, check_loss, loss_of, measured
from oa_train.models.selection import Components
from oa_train.models.graph import Graph
from oa_train.models.loading import BUILT_IN, LMSpec
from oa_train.shapes import Bool, Float, Int, Tensor
from oa_train.tasks.task import Task
from oa_train.training.averages import CircuitMeans
from oa_train.training.module import FrozenModelModule
from oa_train.training.parts import MaskedParts
from oa_train.training.prices import Prices
from oa_train.masks.sampler import MaskSampler, StepRows
from oa_train.training.strategies import ShardedStrategy

GraphKind = Literal["nodes", "edges"]


class CircuitModule(FrozenModelModule):
    """Finds the components, or the edges between them, that do a task, and the constants that replace the others.

    Every step runs the model on a batch of prompts as it is, and again on several copies of each prompt with masks
    drawn anew: a component with mask m passes on m times its value plus (1 - m) times its replacement; where the mask
    is of an edge, to the one reader that the edge leads to. The loss is the KL divergence of the clean prediction from
    the masked one, plus the penalty on the number of kept components or edges.

    Several circuits, each with a price or a target size of its own, are trained side by side: a step shows the same
    prompts to all, as copies in one batch, and each has masks and constants of its own. They do not touch each other,
    so this equals training them one after another, but for a clipping of the gradient's norm, which is that of all.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: seeds the mask samples.
        graph: what the circuit is made of: `nodes`, heads and MLPs; or `edges` from what writes to the residual stream
            to what reads it: queries, keys and values of heads, MLPs, and the logits.
        ablation: what replaces an ablated component: `optimal` (constants that are trained), `mean`, `zero`,
            `resample` (its value on another prompt of equal length), `noise` (Gaussian, with its mean and spread),
            `counterfactual_mean`, or `counterfactual` (its value on the prompt's counterfactual).
        loss: `kl`, the divergence from the clean model; `cross_entropy` of the task's answers; `logit_difference` of
            answers against distractors, which is made large.
        positions: size of the constants' table; 1 gives each component one constant, P gives it one for each of the
            positions 0 to P - 2 and one for all later ones. The beginning-of-sequence token is position 0.
        components: a shell pattern, or a list of them, of the components that may be ablated (`a*.h*`, `m*`, `!m0`);
            the others are always kept. Of edges, a pattern of those that may be cut (`a*.h*->logits`, `input->*<v>`);
            one without an arrow is for all edges from a component. The others are kept, those excepted that then lead
            nowhere.
        masks: distribution of the masks.
        penalty: price of a kept component or edge in nats; with a target size the price at the start. A list of
            prices trains a circuit for each of them, side by side: see below.
        node_penalty: with edges, what the edges of a head cost more while it has few, as a part of the penalty; above
            0 it empties heads.
        target_size: how many components or edges the circuit is to have, those that are always kept included; the
            price is then moved until it has them. None keeps the price fixed. A list of sizes trains a circuit for
            each of them.
        target_warmup: optimiser steps in which the goal falls from all components or edges to the target size; less
            than half of the training, so that the masks have time to follow.
        samples_per_prompt: mask samples drawn for each prompt of a batch.
        threshold: a component or edge is in the circuit when its keep-probability exceeds this; of edges only those
            that then lie on a way from the input to the logits.
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
        graph: GraphKind = "nodes",
        ablation: AblationKind = "optimal",
        loss: Loss = "kl",
        positions: int = 1,
        components: str | list[str] = "*",
        masks: Callable[[int], MaskDistribution] = UniformGradientSampling,
        penalty: float | list[float] = 0.05,
        node_penalty: float = 0.0,
        target_size: float | list[float] | None = None,
        target_warmup: int = 200,
        samples_per_prompt: int = 4,
        threshold: float = 0.5,
        mask_learning_rate: float = 0.05,
        constants_learning_rate: float = 0.005,
        activation_checkpointing: bool = False,
    ) -> None:
        # Cheap checks come before the model is loaded.
        kind = check_kind("ablation", ablation)
        _check_graph(graph, node_penalty)
        check_loss("loss", loss)
        _check_positive(positions=positions, samples_per_prompt=samples_per_prompt)
        _check_positive(mask_learning_rate=mask_learning_rate, constants_learning_rate=constants_learning_rate)
        check_threshold(threshold)
        prices = Prices(penalty, node_penalty, target_size, target_warmup)
        super().__init__(lm, seed)
        self.graph: GraphKind = graph
        self.threshold = threshold
        self.ablation: AblationKind = ablation
        self.kind = kind
        self.loss: Loss = loss
        self.positions = positions
        self.samples_per_prompt = samples_per_prompt
        self.mask_learning_rate = mask_learning_rate
        self.constants_learning_rate = constants_learning_rate
        self.activation_checkpointing = activation_checkpointing
        self.parts: Components | Graph = self.components if graph == "nodes" else Graph.of(self.frozen.config)
        self.masked = MaskedParts(self.parts, [components] if isinstance(components, str) else components)
        self.prices = prices
        self.n_circuits = prices.n_circuits
        self.masks = masks(self.n_circuits * self.masked.n_selected)
        self.sampler = MaskSampler(self.masks, seed, samples_per_prompt, self.masked.effective)
        self.penalty = prices.make(self.masked, mask_learning_rate)
        self.constants: TrainableConstants | None = None
        if kind.constant:
            start = Constants.zeros(self.dimensions, self.bos_token_id, positions)
            self.constants = TrainableConstants([start] * self.n_circuits, with_inputs=graph == "edges")
            if not kind.learned:
                self.constants.requires_grad_(False)
        self._other_ablation: Ablation | None = None
        self._prepared_for: Task | None = None
        self._counted: tuple[tuple[int, int], StepRows | None] | None = None
        self.constants_started: Tensor
        self.register_buffer("constants_started", torch.tensor(ablation == "zero"))
        self.evaluated = torch.nn.ModuleDict({name: CircuitMeans(self.n_circuits) for name in MEASURES})

    def describe(self) -> dict[str, Any]:
        """Graph, components, mask distribution, kind of penalty and ablation."""
        return {
            "graph": self.graph,
            "circuits": self.n_circuits,
            "components": self.masked.description,
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
            **self.prices.settings(),
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
            "params": [table for table in self.constants.tables() if table.requires_grad],
            "lr": self.constants_learning_rate,
        }
        return torch.optim.Adam([masks, constants])

    def configure_model(self) -> None:
        """Share the model out where the strategy is to do so.

        Raises:
            ConfigurationError: strategy or precision would change what is trained, or do not go with edges.
        """
        if self.graph == "edges" and isinstance(self.trainer.strategy, ShardedStrategy):
            raise ConfigurationError(
                "The strategy fsdp shares the weights of a block out again when the block has run, and gradients of "
                "edges need them once more. Train circuits of nodes under it, or edges with --trainer.strategy ddp "
                "and --lm.dtype bfloat16."
            )
        super().configure_model()

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
        warmup = self.prices.target_warmup
        if self.prices.target_size is not None and self.planned_steps() < 2 * warmup:
            rank_zero_warn(
                f"The circuit shrinks to target_size in {warmup} steps and then settles; this training has "
                f"{self.planned_steps()} steps, so it may end larger. Train for longer, or lower target_warmup."
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

    def replacing(self) -> list[Ablation]:
        """What replaces ablated parts, for each circuit or one for all; gradients flow to the constants as trained.

        Raises:
            ConfigurationError: nothing has been fitted, validated or tested, so the ablation is not prepared.
        """
        if self.constants is not None:
            return [*self.constants.sets()]
        if self._other_ablation is None:
            raise ConfigurationError(
                f"The {self.ablation} ablation is prepared with the task's prompts when a trainer fits, validates or "
                "tests; without one, use `KINDS` of oa_train.ablations.registry."
            )
        return [self._other_ablation]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as Lightning does, then let the penalty set the price of the next step."""
        super().optimizer_step(*args, **kwargs)
        if self.prices.target_size is not None:  # else the price stays, and no circuit need be cut out
            with torch.no_grad():
                self.penalty.update(self._probabilities().sum(dim=1), self._priced_sizes())

    def _priced_sizes(self) -> Int[Tensor, " circuit"]:
        """Sizes that prices go by: what is kept of the selected parts, and all others, be they of use or not."""
        return (self.circuit_masks() & self.masked.selection).sum(dim=1) + self.masked.n_fixed

    def _probabilities(self) -> Float[Tensor, "circuit entry"]:
        """Keep-probabilities of the parts that masks are drawn for."""
        return self.masks.keep_probability().view(self.n_circuits, -1)

    def sample_masks(self, batch: Batch, step: StepRows | None = None) -> Float[Tensor, "row entry"]:
        """Draw masks over all components or edges for every circuit and prompt; what is not selected is kept.

        A prompt's masks follow from the seed and its number, however prompts are shared out to batches and processes.

        Args:
            batch: B prompts.
            step: rows that gradients are averaged over; those of this batch when not given.

        Returns:
            C * S * B rows, laid out as `batch.repeat(C * S)` lays out the prompts, all rows of a circuit together, S
            being `samples_per_prompt`.
        """
        drawn = self.sampler.draw(batch.example_ids, step)
        return self.masked.spread(self.masked.by_circuit(drawn).flatten(0, 1))

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
    ) -> tuple[Float[Tensor, " circuit"], Float[Tensor, " circuit"]]:
        """Each circuit's loss under sampled masks, and its penalty; training minimises the sum of all.

        Args:
            batch: prompts.
            clean: what the unablated model predicts for them.
            step: rows that mask gradients are averaged over; those of this batch when not given.
        """
        samples, copies = self.samples_per_prompt, self.n_circuits * self.samples_per_prompt
        rows = batch.repeat(copies)
        mask = self.sample_masks(batch, step)
        ablations = self.replacing()
        each = ablations if len(ablations) == 1 else [one for one in ablations for _ in range(samples)]
        replacements = replacements_of_copies(each, batch, copies, partial(source_values, self.frozen))
        recompute = self.activation_checkpointing
        logits = masked_logits(self.frozen, rows, mask, replacements, self.bos_token_id, recompute)
        lost = loss_of(self.loss, clean.repeat(copies, 1, 1), logits, rows)
        return lost.view(self.n_circuits, -1).mean(dim=1), self.penalty(self._probabilities())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; see `masked_loss`."""
        lost, penalty = self.masked_loss(batch, self.clean_logits(batch), self._rows_of_step(batch, batch_idx))
        measure, means, paid = f"train/{self.loss}", self.over_processes(lost), penalty.detach()
        self.check_finite({measure: means, "train/penalty": paid}, "Parts of the loss")
        figures = {
            measure: LOSS_SIGNS[self.loss] * means,
            "train/penalty": paid,
            "train/price": self.penalty.price.expand(self.n_circuits),
            "train/size": self._probabilities().detach().sum(dim=1) + self.masked.n_fixed,
        }
        self.log("train/loss", (means + paid).mean(), prog_bar=True, batch_size=len(batch))
        self.log_dict(self._each_and_mean(figures), batch_size=len(batch))
        # A sum over circuits: each circuit's gradient is that of its own loss, however many run beside it.
        return (lost + penalty).sum() * self.share_of_step(batch_idx)

    def _each_and_mean(self, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Figures of all circuits: their means and, of several circuits, those of each as `name/number`."""
        shown = {name: values.float().mean() for name, values in figures.items()}
        if self.n_circuits > 1:
            for name, values in figures.items():
                shown |= {f"{name}/{number}": value for number, value in enumerate(values.float())}
        return shown

    @torch.no_grad()
    def thresholded(self) -> Bool[Tensor, "circuit entry"]:
        """The thresholded masks over all components or edges."""
        return self.masked.spread(self.masks.threshold(self.threshold).view(self.n_circuits, -1))

    def circuit_masks(self) -> Bool[Tensor, "circuit entry"]:
        """The discrete circuits: what is above the threshold; of edges those that lead from input to logits."""
        return without_dangling(self.parts, self.thresholded())

    @torch.no_grad()
    def keep_probability(self) -> Float[Tensor, "circuit entry"]:
        """Keep-probability of every component or edge; 1 for those that are not selected."""
        return self.masked.spread(self._probabilities().float())

    def check_size(self, size: int) -> None:
        """Check that a circuit can have so many parts.

        Raises:
            ConfigurationError: the model has fewer, or more are always kept.
        """
        if not max(1, self.masked.n_fixed) <= size <= len(self.parts):
            raise ConfigurationError(
                f"A circuit of {size} parts was asked for; this model has {len(self.parts)}, of which "
                f"{self.masked.n_fixed} are always kept because `components` does not select them."
            )

    def circuits(self, size: int | None = None) -> list[Circuit]:
        """The discrete circuits; see `circuit`."""
        return [self.circuit(number, size) for number in range(self.n_circuits)]

    def circuit(self, number: int = 0, size: int | None = None) -> Circuit:
        """A discrete circuit.

        Args:
            number: which; the first is the only one unless several were asked for.
            size: parts of the circuit, those of the highest keep-probability; all above the threshold by default.

        Raises:
            ConfigurationError: see `check_size`.
        """
        mask, scores = self.circuit_masks()[number].cpu(), self.keep_probability()[number].cpu()
        before = {}
        if size is not None:
            self.check_size(size)
            # What is not selected comes first, whatever else has saturated.
            mask = highest_circuit(self.parts, scores + ~self.masked.selection.cpu(), size)
        elif self.graph == "edges":
            before = {"edges_before_removal": int(self.thresholded()[number].sum())}
        provenance = (
            self.provenance()
            | before
            | {
                "ablation": self.ablation,
                "loss": self.loss,
                "selected": self.masked.description,
                "training": {name: one for name, one in self.settings().items() if name not in ("lm", "seed")}
                | self.prices.asked(number),
            }
        )
        return Circuit.from_mask(self.parts, mask, scores, provenance)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate the thresholded circuit."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate the thresholded circuit."""
        self._evaluate(batch)

    def _evaluate(self, batch: Batch) -> None:
        clean, rows = self.clean_logits(batch), batch.repeat(self.n_circuits)
        logits = circuit_logits(self.frozen, batch, self.circuit_masks(), self.replacing())
        repeated = clean.repeat(self.n_circuits, 1, 1)
        for name, average in self._averages():
            found = measured(name, repeated, logits, rows).view(self.n_circuits, -1)
            average.update(found.mean(dim=1), len(batch))

    def _averages(self) -> Iterator[tuple[str, CircuitMeans]]:
        for name, average in self.evaluated.items():
            assert isinstance(average, CircuitMeans)
            yield name, average

    def _log_evaluation(self, stage: str) -> dict[str, Tensor]:
        """Log the measures and sizes of all circuits, and return them."""
        figures: dict[str, Tensor] = {"size": self.circuit_masks().sum(dim=1)}
        for name, average in self._averages():
            # torchmetrics turns a tensor of one element into a number.
            figures[name] = average.compute().reshape(self.n_circuits)
            average.reset()
        for name, value in self._each_and_mean({f"{stage}/{name}": one for name, one in figures.items()}).items():
            self.log(name, value, prog_bar=name in (f"{stage}/kl", f"{stage}/size"), sync_dist=True)
        return figures

    def on_validation_epoch_end(self) -> None:
        """Log the measures, the sizes, and what the best checkpoint minimises."""
        figures = self._log_evaluation("val")
        loss = LOSS_SIGNS[self.loss] * figures[self.loss]
        self.log("val/objective", self.penalty.objective(loss, self._priced_sizes()).mean(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the measures and the sizes."""
        self._log_evaluation("test")


def _check_graph(graph: str, node_penalty: float) -> None:
    if graph not in get_args(GraphKind):
        raise ConfigurationError(f"graph is {graph!r}. {nearest_names(graph, get_args(GraphKind))}")
    if graph == "nodes" and node_penalty:
        raise ConfigurationError(
            f"node_penalty is {node_penalty}, which is for edges: set graph to edges, or leave it."
        )


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigurationError(f"{name} is {value}; expected more than 0.")
