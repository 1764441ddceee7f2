"""Training a circuit: sparse masks and optimal-ablation constants together."""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torchmetrics import MeanMetric

from oa_train.ablations.base import AblationKind
from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import Batch
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.interventions.activations import node_means
from oa_train.interventions.base import scored_logits
from oa_train.interventions.nodes import node_logits
from oa_train.masks.base import MaskDistribution, check_threshold
from oa_train.masks.penalties import SizePenalty
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.behaviour import is_correct, logit_difference
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.loading import BUILT_IN, LMSpec
from oa_train.seeds import torch_generator
from oa_train.shapes import Bool, Float, Tensor
from oa_train.training.base import FrozenModelModule
from oa_train.training.data import EVALUATION_BATCH

EVALUATED = ("kl", "accuracy", "logit_difference")


class CircuitModule(FrozenModelModule):
    """Finds the components that do a task, and the constants that replace the others.

    Every step runs the model on a batch of prompts as it is, and again on several copies of each prompt with masks
    drawn anew: a component with mask m passes on m times its value plus (1 - m) times its constant. The loss is the
    KL divergence of the clean prediction from the masked one, plus the penalty on the number of kept components.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: seeds the mask samples.
        ablation: what replaces an ablated component: `optimal` (constants that are trained), `mean` or `zero`.
        positions: size of the constants' table; 1 gives each component one constant, P gives it one for each of the
            positions 0 to P - 2 and one for all later ones. The beginning-of-sequence token is position 0.
        components: a shell pattern, or a list of them, of the components that may be ablated (`a*.h*`, `m*`, `!m0`);
            the others are always kept.
        masks: distribution of the masks.
        penalty: price of a kept component in nats.
        samples_per_prompt: mask samples drawn for each prompt of a batch.
        threshold: a component is in the circuit when its keep-probability exceeds this.
        mask_learning_rate: Adam's learning rate of the mask parameters.
        constants_learning_rate: Adam's learning rate of the constants.

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
        positions: int = 1,
        components: str | list[str] = "*",
        masks: Callable[[int], MaskDistribution] = UniformGradientSampling,
        penalty: float = 0.05,
        samples_per_prompt: int = 4,
        threshold: float = 0.5,
        mask_learning_rate: float = 0.05,
        constants_learning_rate: float = 0.005,
    ) -> None:
        # Cheap checks come before the model is loaded.
        if ablation not in get_args(AblationKind):
            raise ConfigurationError(f"ablation is {ablation!r}. {nearest_names(ablation, get_args(AblationKind))}")
        _check_positive(positions=positions, samples_per_prompt=samples_per_prompt)
        _check_positive(mask_learning_rate=mask_learning_rate, constants_learning_rate=constants_learning_rate)
        self_threshold, size_penalty = check_threshold(threshold), SizePenalty(penalty)
        super().__init__(lm, seed)
        self.threshold = self_threshold
        self.penalty = size_penalty
        self.ablation: AblationKind = ablation
        self.samples_per_prompt = samples_per_prompt
        self.mask_learning_rate = mask_learning_rate
        self.constants_learning_rate = constants_learning_rate
        self.selected = self.components.select([components] if isinstance(components, str) else components)
        self.masks = masks(len(self.selected))
        start = Constants.zeros(self.dimensions, self.bos_token_id, positions)
        self.constants = TrainableConstants([start]).requires_grad_(ablation == "optimal")
        self.selection: Tensor
        self.register_buffer("selection", self.components.mask(self.selected), persistent=False)
        self.constants_started: Tensor
        self.register_buffer("constants_started", torch.tensor(ablation == "zero"))
        self.evaluated = torch.nn.ModuleDict({name: MeanMetric() for name in EVALUATED})

    def describe(self) -> dict[str, Any]:
        """Components, mask distribution and ablation."""
        return {
            "components": list(self.selected),
            "masks": self.masks.describe(),
            "ablation": self.ablation,
            "positions": self.constants.heads.shape[2],
        }

    def settings(self) -> dict[str, Any]:
        """Arguments that build this module again, as plain values."""
        return {
            "lm": self.lm_settings(),
            "seed": self.seed,
            "penalty": self.penalty.weight,
            "samples_per_prompt": self.samples_per_prompt,
            "threshold": self.threshold,
            "mask_learning_rate": self.mask_learning_rate,
            "constants_learning_rate": self.constants_learning_rate,
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
        constants = {
            "name": "constants",
            "params": list(self.constants.parameters()),
            "lr": self.constants_learning_rate,
        }
        return torch.optim.Adam([masks, constants] if self.ablation == "optimal" else [masks])

    def on_train_start(self) -> None:
        """Use this module's learning rates, also where a checkpoint has just brought those of the run before."""
        rates = {"masks": self.mask_learning_rate, "constants": self.constants_learning_rate}
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates[group["name"]]

    def on_fit_start(self) -> None:
        """Start the constants at the means, unless a checkpoint brought them."""
        if bool(self.constants_started):
            return
        task = self.data.task
        batches = task.batches("means", task.n_means, EVALUATION_BATCH)
        means = node_means(self.frozen, batches, self.bos_token_id)
        self.constants.load(means.table(self.constants.heads.shape[2]))
        self.constants_started.fill_(True)

    def sample_masks(self, n_rows: int, *key: int | str) -> Float[Tensor, "row component"]:
        """Draw masks over all components; those that are not selected are kept.

        Args:
            n_rows: number of masks.
            *key: what the draw is for; the same key draws the same masks.
        """
        generator = torch_generator(self.seed, "masks", *key, device=self.selection.device)
        drawn = self.masks.sample(n_rows, generator)
        kept = torch.ones(n_rows, len(self.components), device=drawn.device, dtype=drawn.dtype)
        return kept.masked_scatter(self.selection, drawn)

    @torch.no_grad()
    def clean_logits(self, batch: Batch) -> Float[Tensor, "batch vocabulary"]:
        """What the unablated model predicts."""
        return scored_logits(self.frozen, batch)

    def masked_loss(
        self, batch: Batch, clean: Float[Tensor, "batch vocabulary"], *key: int | str
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """KL divergence under sampled masks, and the penalty; their sum is what training minimises.

        Args:
            batch: prompts.
            clean: what the unablated model predicts for them.
            *key: names the mask samples (see `sample_masks`).
        """
        rows = batch.repeat(self.samples_per_prompt)
        mask = self.sample_masks(len(rows), *key)
        replacements = self.constants.sets()[0].replacements(rows)
        logits = node_logits(self.frozen, rows, mask, replacements, self.bos_token_id)
        kl = kl_divergence(clean.repeat(self.samples_per_prompt, 1), logits).mean()
        return kl, self.penalty(self.masks)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; see `masked_loss`."""
        kl, penalty = self.masked_loss(
            batch, self.clean_logits(batch), self.global_rank, self.current_epoch, batch_idx
        )
        loss: Tensor = kl + penalty
        self.check_finite({"train/kl": kl.detach(), "train/penalty": penalty.detach()}, "Parts of the loss")
        size = self.masks.expected_size().detach() + len(self.components) - len(self.selected)
        figures = {"train/kl": kl.detach(), "train/penalty": penalty.detach(), "train/size": size}
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log_dict(figures, batch_size=len(batch))
        return loss

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
        provenance = self.provenance() | {"selected": list(self.selected)}
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
        replacements = self.constants.sets()[0].replacements(batch)
        logits = node_logits(self.frozen, batch, mask.float().expand(len(batch), -1), replacements, self.bos_token_id)
        figures = {
            "kl": kl_divergence(clean, logits),
            "accuracy": is_correct(logits, batch.answers).float(),
            "logit_difference": logit_difference(logits.float(), batch.answers, batch.distractors),
        }
        for name, values in figures.items():
            average = self._average(name)
            average.update(values)
            self.log(f"{stage}/{name}", average, prog_bar=name == "kl", batch_size=len(batch))
        self.log(f"{stage}/size", mask.sum().float(), prog_bar=True, batch_size=len(batch))

    def _average(self, name: str) -> MeanMetric:
        average = self.evaluated[name]
        assert isinstance(average, MeanMetric)
        return average

    def on_validation_epoch_end(self) -> None:
        """Log what the best checkpoint minimises."""
        size = self.circuit_mask().sum()
        self.log("val/objective", self._average("kl").compute() + self.penalty.weight * size)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigurationError(f"{name} is {value}; expected more than 0.")
