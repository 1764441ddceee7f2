"""Training constants alone: for a given circuit, or for every component ablated alone, in one job."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import Batch
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.ablations.context import check_belongs
from oa_train.engine.forward import scored_logits
from oa_train.ablations.evaluation import ROWS_PER_RUN, circuit_behaviour
from oa_train.ablations.registry import KINDS, AblationSource, Kind, check_kind
from oa_train.engine.levels import replaced_sources
from oa_train.metrics.measures import LOSS_SIGNS, Loss, check_loss
from oa_train.models.loading import BUILT_IN, LMSpec
from oa_train.shapes import Float, Tensor
from oa_train.training.averages import CircuitMeans
from oa_train.training.module import FrozenModelModule
from oa_train.ablations.best import BestConstants
from oa_train.ablations.fitting import circuit_losses, falling

# Share of its loss by which one circuit at least must improve for a validation to count as progress.
LEAST_PROGRESS = 0.01


class ConstantsModule(FrozenModelModule):
    """Finds the constants that replace components best, the circuit being given.

    Components that are ablated alone are trained side by side: a step shows the same prompts to all, and each row of
    the batch reads and moves the constants of its own component only, so this equals one job for each.

    Exactly one of `circuit`, `keep` and `alone` says what is ablated.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: kept for the record; nothing here is drawn.
        circuit: folder of a circuit, or of a run that has one; everything outside of it is ablated.
        keep: names or shell patterns of the components that are kept, all others being ablated.
        alone: names or shell patterns of components, each of which is ablated alone (`*` for all).
        start: where the constants start: `mean`, `zero` or `counterfactual_mean`, or a folder of constants, or of a
            run that has some.
        loss: `kl`, `cross_entropy` or `logit_difference`; see `CircuitModule`.
        positions: size of the constants' table; 1 gives each component one constant.
        learning_rate: of Adam at the start; it falls to zero along a cosine over the whole training.
        patience: validations after which the training ends when no circuit's loss has fallen by a hundredth; never
            when not given.
        rows_per_run: most rows (circuits times prompts) whose activations are kept at once; further circuits are run
            twice in a step, which bounds memory and changes no result.
        activation_checkpointing: keep only what enters each decoder block and run the block again in the backward
            pass; less memory, more time, the same result.

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
        activation_checkpointing: bool = False,
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
        starts_from = Constants.load(_inside(start, "constants")) if Path(start).is_dir() else _start_kind(start)
        super().__init__(lm, seed)
        self.loss: Loss = loss
        self.positions = positions
        self.learning_rate = learning_rate
        self.patience = patience
        self.rows_per_run = rows_per_run
        self.activation_checkpointing = activation_checkpointing
        self.start = start
        self._starts_from = starts_from
        self.circuits = self._circuits(circuit, keep, alone)
        self.masks: Tensor
        self.register_buffer("masks", torch.stack([one.mask for one in self.circuits.values()]), persistent=False)
        # One table: no two of the circuits ablate the same component.
        replaced = replaced_sources(self.frozen, self.masks)
        start_tables = [Constants.zeros(self.dimensions, self.bos_token_id, positions)]
        self.constants = TrainableConstants(start_tables, with_inputs=bool(replaced[:, 0].any()))
        self.best = BestConstants(replaced, self.constants)
        self.constants_started: Tensor
        self.register_buffer("constants_started", torch.tensor(False))
        self.progress: Tensor
        self.register_buffer("progress", torch.full((len(self.circuits),), float("inf")))
        self.stale: Tensor
        self.register_buffer("stale", torch.tensor(0))
        self._candidates: list[TrainableConstants] = []
        self.validation_losses = torch.nn.ModuleList()
        self._measure(1)

    def _circuits(
        self, circuit: str | None, keep: str | list[str] | None, alone: str | list[str] | None
    ) -> dict[str, Circuit]:
        if circuit is not None:
            loaded = Circuit.load(_inside(circuit, "circuit"))
            check_belongs(self.frozen, loaded, None)
            return {"circuit": loaded}
        if keep is not None:
            return {"circuit": Circuit.from_patterns(self.components, _as_list(keep))}
        ablated = self.components.select(_as_list(alone or []))
        if not ablated:
            raise ConfigurationError(f"alone is {alone!r}, which selects no component; * selects all.")
        return {name: Circuit.from_patterns(self.components, ["*", f"!{name}"]) for name in ablated}

    @property
    def each_alone(self) -> bool:
        """Whether each circuit lacks one component."""
        return "circuit" not in self.circuits

    def describe(self) -> dict[str, Any]:
        """What is ablated, and for which loss constants are sought."""
        return {
            "kept": {name: list(circuit.names) for name, circuit in self.circuits.items()},
            "start": self.start if isinstance(self._starts_from, Kind) else "constants",
            "positions": self.positions,
            "loss": self.loss,
        }

    def settings(self) -> dict[str, Any]:
        """Arguments that build this module again, as plain values."""
        return {
            "lm": self.lm_settings(),
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "patience": self.patience,
            "activation_checkpointing": self.activation_checkpointing,
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
        decay = LambdaLR(optimizer, lambda step: falling(step, n_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def on_train_start(self) -> None:
        """Use this module's learning rate, also where a checkpoint has just brought that of the run before."""
        (config,) = self.trainer.lr_scheduler_configs
        config.scheduler.base_lrs = [self.learning_rate]
        done = config.scheduler.last_epoch
        self.trainer.optimizers[0].param_groups[0]["lr"] = self.learning_rate * falling(done, self.planned_steps())

    def on_fit_start(self) -> None:
        """Start where it was asked to, unless a checkpoint brought constants; mean and zero are the first to beat."""
        if self.patience is not None and self.trainer.limit_val_batches == 0:
            raise ConfigurationError("patience counts validations, and trainer.limit_val_batches is 0.")
        started = bool(self.constants_started)
        if started and bool(torch.isfinite(self.best.loss).all()):
            return
        source = AblationSource(self.frozen, self.data.task, self.positions, self.track)
        start = self._starting_constants(source)
        if not started:
            self.constants.load(start)
            self.constants_started.fill_(True)
            self.share_from_first_process(self.constants.parameters())
        # The means are the usual start, and need not be evaluated twice.
        candidates = [start, source.zero] if start is source.mean else [start, source.mean, source.zero]
        self._candidates = [TrainableConstants([one]).to(self.device).requires_grad_(False) for one in candidates]
        self._measure(1 + len(candidates))

    def _measure(self, n_tables: int) -> None:
        """Make room for the losses of so many tables, of which the trained one is the first."""
        made = [CircuitMeans(len(self.circuits)).to(self.device) for _ in range(n_tables)]
        self.validation_losses = torch.nn.ModuleList(made)

    def _starting_constants(self, source: AblationSource) -> Constants:
        if isinstance(self._starts_from, Constants):
            check_belongs(self.frozen, next(iter(self.circuits.values())), self._starts_from)
            return self._starts_from.with_positions(self.positions)
        prepared = self._starts_from.prepare(source)
        assert isinstance(prepared, Constants)
        return prepared

    def losses(self, batch: Batch, clean: Float[Tensor, "batch scored vocabulary"]) -> Float[Tensor, " circuit"]:
        """Mean loss of every circuit over the prompts, with gradients to its own constants.

        Args:
            batch: prompts.
            clean: what the unablated model predicts for them.
        """
        at_once = max(1, self.rows_per_run // len(batch))

        def some(chosen: slice, *tables: Tensor) -> Tensor:
            table = Constants.from_tensors(tables, self.bos_token_id)
            masks, recompute = self.masks[chosen], self.activation_checkpointing
            return circuit_losses(self.frozen, batch, clean, masks, [table], self.loss, recompute)

        tables = [table[0] for table in self.constants.tables()]
        parts = [slice(first, first + at_once) for first in range(0, len(self.circuits), at_once)]
        if len(parts) == 1:
            return some(parts[0], *tables)
        # Run again in the backward pass: only one part's activations are alive at a time.
        return torch.cat([checkpoint(some, part, *tables, use_reentrant=False) for part in parts])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of all circuits."""
        with torch.no_grad():
            clean = scored_logits(self.frozen, batch)
        losses = self.losses(batch, clean)
        means = self.over_processes(losses)
        self.check_finite({"train/loss": means}, "Losses")
        self.log("train/loss", means.mean(), prog_bar=True, batch_size=len(batch))
        # A sum over circuits: each circuit's gradient is that of its own mean, however many run beside it.
        return losses.sum() * self.share_of_step(batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the constants as they are now, and once of those where the training may have started."""
        self._evaluate(batch, [self.constants.sets(), *(one.sets() for one in self._candidates)])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the best constants."""
        self._evaluate(batch, [self.best.sets()])

    def _evaluate(self, batch: Batch, tables: Sequence[Sequence[Constants]]) -> None:
        # As many circuits at once in every process, whose batches may differ by a prompt: where the model is shared
        # out, all processes run it together.
        at_once = max(1, self.rows_per_run // self.data.task.evaluation_batch_size)
        for metric, table in zip(self.validation_losses, tables, strict=False):
            assert isinstance(metric, CircuitMeans)
            found = circuit_behaviour(self.frozen, [batch], self.masks, table, at_once * len(batch))
            metric.update(found.loss(self.loss).mean(dim=1).to(self.device), len(batch))

    def _mean_losses(self, index: int) -> Float[Tensor, " circuit"]:
        metric = self.validation_losses[index]
        assert isinstance(metric, CircuitMeans)
        # torchmetrics turns a tensor of one element into a number.
        losses: Tensor = metric.compute().reshape(len(self.circuits))
        metric.reset()
        return losses

    def on_validation_epoch_end(self) -> None:
        """Keep what is best for each circuit; the best checkpoint minimises the mean of the best losses."""
        found = [self._mean_losses(index) for index in range(1 + len(self._candidates))]
        if self.trainer.sanity_checking:  # of a few prompts, with which later figures cannot be compared
            return
        for candidate, losses in zip(self._candidates, found[1:], strict=True):
            self.best.offer(candidate, losses)
        self._candidates = []
        self.best.offer(self.constants, found[0])
        self.log(f"val/{self.loss}", LOSS_SIGNS[self.loss] * found[0].mean(), prog_bar=True, sync_dist=True)
        self.log("val/objective", self.best.loss.mean(), sync_dist=True)
        self._stop_when_flat()

    def _stop_when_flat(self) -> None:
        least = torch.where(self.progress.isfinite(), LEAST_PROGRESS * self.progress.abs(), 0.0)
        fallen = self.best.loss < self.progress - least
        self.progress[fallen] = self.best.loss[fallen]
        self.stale = torch.zeros_like(self.stale) if bool(fallen.any()) else self.stale + 1
        if self.patience is not None and int(self.stale) >= self.patience:
            self.trainer.should_stop = True

    def on_test_epoch_end(self) -> None:
        """Report the mean over circuits."""
        losses = self._mean_losses(0)
        self.log(f"test/{self.loss}", LOSS_SIGNS[self.loss] * losses.mean(), sync_dist=True)

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
        # Without any validation the last constants are all there is to know.
        known = bool(torch.isfinite(self.best.loss).all())
        (table,) = self.best.sets() if known else self.constants.sets()
        return replace(table.detach().to("cpu"), provenance=self._optimal_provenance())


def _start_kind(name: str) -> Kind:
    """The ablation whose constants the training starts from."""
    kinds = [kind.name for kind in KINDS.values() if kind.constant and not kind.learned]
    if name not in kinds:
        raise ConfigurationError(
            f"start is {name!r}, which is no folder of constants either. {nearest_names(name, kinds)}"
        )
    return check_kind("start", name)


def _inside(folder: str, artefact: str) -> Path:
    """The folder of an artefact, which may be given by the run that it is in."""
    path = Path(folder)
    return path / artefact if (path / artefact).is_dir() else path


def _as_list(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns
