"""Training constants alone: for a given circuit, or for every component ablated alone, in one job."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric

from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import Batch
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.interventions.ablated import check_belongs
from oa_train.interventions.base import scored_logits
from oa_train.interventions.evaluation import ROWS_PER_RUN, circuit_behaviour
from oa_train.interventions.kinds import KINDS, AblationSource, Kind, check_kind
from oa_train.metrics.measures import LOSS_SIGNS, Loss, check_loss
from oa_train.models.loading import BUILT_IN, LMSpec
from oa_train.shapes import Float, Tensor
from oa_train.training.base import FrozenModelModule
from oa_train.training.refit import circuit_losses

# Nats by which the mean of the best losses must fall between two validations to count as progress.
LEAST_PROGRESS = 1e-4


class CircuitMeans(Metric):
    """Mean of a figure of each circuit over all prompts, on all processes.

    Args:
        n_circuits: how many.
    """

    total: Tensor
    count: Tensor

    def __init__(self, n_circuits: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(n_circuits), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, means: Float[Tensor, " circuit"], n_prompts: int) -> None:
        """Add the means over some prompts."""
        self.total += means * n_prompts
        self.count += n_prompts

    def compute(self) -> Float[Tensor, " circuit"]:
        """The means over all prompts so far."""
        return self.total / self.count


class ConstantsModule(FrozenModelModule):
    """Finds the constants that replace components best, the circuit being given.

    Several circuits, each component ablated alone for instance, are trained side by side: each has constants of its
    own, and a step shows the same prompts to all. They do not touch each other, so this equals one job for each.

    Exactly one of `circuit`, `keep` and `alone` says what is ablated.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: kept for the record; nothing here is drawn.
        circuit: folder of a circuit, or of a run that has one; everything outside of it is ablated.
        keep: names or shell patterns of the components that are kept, all others being ablated.
        alone: names or shell patterns of components, each of which is ablated alone (`*` for all).
        start: where the constants start: `mean`, `zero` or `counterfactual_mean`, or a folder of constants.
        loss: `kl`, `cross_entropy` or `logit_difference`; see `CircuitModule`.
        positions: size of the constants' table; 1 gives each component one constant.
        learning_rate: of Adam at the start; it falls to zero along a cosine over the whole training.
        patience: validations without progress after which the training ends; never when not given.
        rows_per_run: most rows (circuits times prompts) whose activations are kept at once; further circuits are run
            twice in a step, which bounds memory and changes no result.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        ModelError: the model cannot be loaded.
        ArtefactError: a folder holds nothing that fits.
    """

    def __init__(
        self,
        *,
        lm: LMSpec = BUILT_IN,
        seed: int = 0,
        circuit: str | None = None,
        keep: str | list[str] | None = None,
        alone: str | list[str] | None = None,
        start: str = "mean",
        loss: Loss = "kl",
        positions: int = 1,
        learning_rate: float = 0.01,
        patience: int | None = None,
        rows_per_run: int = ROWS_PER_RUN,
    ) -> None:
        given = {"circuit": circuit, "keep": keep, "alone": alone}
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise ConfigurationError(
                f"Give exactly one of circuit (a folder), keep (components) and alone (components); given: "
                f"{', '.join(chosen) or 'none'}."
            )
        check_loss("loss", loss)
        numbers = {"positions": positions, "learning_rate": learning_rate, "rows_per_run": rows_per_run}
        for name, value in numbers.items() | ({"patience": patience}.items() if patience is not None else set()):
            if not value > 0:
                raise ConfigurationError(f"{name} is {value}; expected more than 0.")
        starts_from = Constants.load(start) if Path(start).is_dir() else _start_kind(start)
        super().__init__(lm, seed)
        self.loss: Loss = loss
        self.positions = positions
        self.learning_rate = learning_rate
        self.patience = patience
        self.rows_per_run = rows_per_run
        self.start = start
        self._starts_from = starts_from
        self.circuits = self._circuits(circuit, keep, alone)
        zeros = Constants.zeros(self.dimensions, self.bos_token_id, positions)
        self.constants = TrainableConstants([zeros] * len(self.circuits))
        self.best = TrainableConstants([zeros] * len(self.circuits)).requires_grad_(False)
        self.masks: Tensor
        self.register_buffer("masks", torch.stack([one.mask for one in self.circuits.values()]), persistent=False)
        self.best_loss: Tensor
        self.register_buffer("best_loss", torch.full((len(self.circuits),), float("inf")))
        self.validation_loss = CircuitMeans(len(self.circuits))

    def _circuits(
        self, circuit: str | None, keep: str | list[str] | None, alone: str | list[str] | None
    ) -> dict[str, Circuit]:
        if circuit is not None:
            folder = Path(circuit)
            loaded = Circuit.load(folder / "circuit" if (folder / "circuit").is_dir() else folder)
            check_belongs(self.frozen, loaded, None)
            return {"circuit": loaded}
        if keep is not None:
            return {"circuit": Circuit.from_patterns(self.components, _as_list(keep))}
        ablated = self.components.select(_as_list(alone or []))
        return {name: Circuit.from_patterns(self.components, ["*", f"!{name}"]) for name in ablated}

    @property
    def each_alone(self) -> bool:
        """Whether each circuit lacks one component."""
        return "circuit" not in self.circuits

    def describe(self) -> dict[str, Any]:
        """What is ablated, and for which loss constants are sought."""
        return {
            "kept": {name: list(circuit.nodes) for name, circuit in self.circuits.items()},
            "positions": self.positions,
            "loss": self.loss,
        }

    def settings(self) -> dict[str, Any]:
        """Arguments that build this module again, as plain values."""
        return {
            "lm": self.lm_settings(),
            "seed": self.seed,
            "start": self.start,
            "learning_rate": self.learning_rate,
            "patience": self.patience,
            **self.describe(),
        }

    def configure_optimizers(self) -> Any:
        """Adam, its learning rate falling to zero along a cosine over the whole training."""
        n_steps = self.planned_steps()
        if not math.isfinite(n_steps):
            raise ConfigurationError(
                "The learning rate of the constants falls to zero over the training, which therefore needs an end: "
                "give trainer.max_epochs or trainer.max_steps."
            )
        optimizer = torch.optim.Adam(self.constants.parameters(), lr=self.learning_rate)
        decay = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / n_steps, 1.0))))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def configure_callbacks(self) -> Sequence[Callback]:
        """Stop early when a patience was given."""
        if self.patience is None:
            return []
        return [EarlyStopping("val/objective", min_delta=LEAST_PROGRESS, patience=self.patience)]

    def on_fit_start(self) -> None:
        """Start where it was asked to, unless a checkpoint brought constants; mean and zero are the first to beat."""
        if bool(torch.isfinite(self.best_loss).all()):
            return
        task = self.data.task
        source = AblationSource(self.frozen, task, self.positions, self.track)
        start = self._starting_constants(source)
        self.constants.load(start)
        batches = list(task.batches("validation", task.n_validation))
        for candidate in (start, source.mean, source.zero):
            shown = self.track(batches, "evaluating where to start")
            found = circuit_behaviour(self.frozen, shown, self.masks, [candidate], self.rows_per_run)
            offered = TrainableConstants([candidate] * len(self.circuits)).to(self.device)
            self._offer(offered, found.loss(self.loss).mean(dim=1).to(self.device))

    def _starting_constants(self, source: AblationSource) -> Constants:
        if isinstance(self._starts_from, Constants):
            check_belongs(self.frozen, next(iter(self.circuits.values())), self._starts_from)
            return self._starts_from.with_positions(self.positions)
        prepared = self._starts_from.prepare(source)
        assert isinstance(prepared, Constants)
        return prepared

    @torch.no_grad()
    def _offer(self, candidate: TrainableConstants, loss: Float[Tensor, " circuit"]) -> None:
        """Keep a candidate for every circuit that it is the best for so far; what is not finite never is."""
        better = loss < self.best_loss
        self.best.heads[better] = candidate.heads[better]
        self.best.mlps[better] = candidate.mlps[better]
        self.best_loss[better] = loss[better]

    def losses(self, batch: Batch, clean: Float[Tensor, "batch scored vocabulary"]) -> Float[Tensor, " circuit"]:
        """Mean loss of every circuit over the prompts, with gradients to its own constants.

        Args:
            batch: prompts.
            clean: what the unablated model predicts for them.
        """
        at_once = max(1, self.rows_per_run // len(batch))
        n_circuits = len(self.circuits)

        def some(chosen: slice, heads: Tensor, mlps: Tensor) -> Tensor:
            tables = zip(heads.unbind(), mlps.unbind(), strict=True)
            sets = [Constants(one, other, self.bos_token_id) for one, other in tables]
            return circuit_losses(self.frozen, batch, clean, self.masks[chosen], sets, self.loss)

        if n_circuits <= at_once:
            return some(slice(None), self.constants.heads, self.constants.mlps)
        # Run again in the backward pass: only one part's activations are alive at a time.
        parts = [slice(first, first + at_once) for first in range(0, n_circuits, at_once)]
        heads, mlps = self.constants.heads, self.constants.mlps
        return torch.cat([checkpoint(some, part, heads[part], mlps[part], use_reentrant=False) for part in parts])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of all circuits."""
        with torch.no_grad():
            clean = scored_logits(self.frozen, batch)
        losses = self.losses(batch, clean)
        self.check_finite({"train/loss": losses.detach()}, "Losses")
        self.log("train/loss", losses.detach().mean(), prog_bar=True, batch_size=len(batch))
        # A sum over circuits: each circuit's gradient is that of its own mean, however many run beside it.
        return losses.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the constants as they are now."""
        self._evaluate(batch, self.constants)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the best constants."""
        self._evaluate(batch, self.best)

    def _evaluate(self, batch: Batch, constants: TrainableConstants) -> None:
        found = circuit_behaviour(self.frozen, [batch], self.masks, constants.sets(), self.rows_per_run)
        self.validation_loss.update(found.loss(self.loss).mean(dim=1).to(self.device), len(batch))

    def _mean_losses(self) -> Float[Tensor, " circuit"]:
        # torchmetrics turns a tensor of one element into a number.
        losses: Tensor = self.validation_loss.compute().reshape(len(self.circuits))
        self.validation_loss.reset()
        return losses

    def on_validation_epoch_end(self) -> None:
        """Keep what is best for each circuit; the best checkpoint minimises the mean of the best losses."""
        losses = self._mean_losses()
        self._offer(self.constants, losses)
        self.log(f"val/{self.loss}", LOSS_SIGNS[self.loss] * losses.mean(), prog_bar=True)
        self.log("val/objective", self.best_loss.mean())

    def on_test_epoch_end(self) -> None:
        """Report the mean over circuits."""
        losses = self._mean_losses()
        self.log(f"test/{self.loss}", LOSS_SIGNS[self.loss] * losses.mean())

    def circuit(self) -> Circuit:
        """The circuit that constants were trained for; whatever it was found under, it is optimally ablated now.

        Raises:
            ConfigurationError: components were ablated alone.
        """
        if self.each_alone:
            raise ConfigurationError("Constants of components that were ablated alone belong to no circuit.")
        given = self.circuits["circuit"]
        return replace(given, provenance={**given.provenance, **self._optimal_provenance()})

    def _optimal_provenance(self) -> dict[str, Any]:
        return self.provenance() | {"ablation": "optimal", "loss": self.loss}

    def best_constants(self) -> Constants:
        """The best constants by validation: of the circuit, or of each component its own from where it was alone."""
        provenance = self._optimal_provenance()
        sets = [one.detach().to("cpu") for one in self.best.sets()]
        if not self.each_alone:
            return Constants(sets[0].heads, sets[0].mlps, self.bos_token_id, provenance)
        merged = Constants.zeros(self.dimensions, self.bos_token_id, self.positions)
        for name, own in zip(self.circuits, sets, strict=True):
            layer, head = divmod(self.components.index(name), self.components.n_heads + 1)
            if head < self.components.n_heads:
                merged.heads[layer, :, head] = own.heads[layer, :, head]
            else:
                merged.mlps[layer] = own.mlps[layer]
        return Constants(merged.heads, merged.mlps, self.bos_token_id, provenance)


def _start_kind(name: str) -> Kind:
    """The ablation whose constants the training starts from."""
    kinds = [kind.name for kind in KINDS.values() if kind.constant and not kind.learned]
    if name not in kinds:
        raise ConfigurationError(
            f"start is {name!r}, which is no folder of constants either. {nearest_names(name, kinds)}"
        )
    return check_kind("start", name)


def _as_list(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns
