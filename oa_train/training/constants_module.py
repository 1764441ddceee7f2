"""Training of constants alone: for a fixed circuit, or in one job for many units that are each ablated alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.ablations.context import check_belongs
from oa_train.ablations.evaluation import circuit_behaviour, circuit_logits
from oa_train.ablations.fitting import NOTICEABLE, FittedCircuits
from oa_train.ablations.registry import ABLATION_KINDS, AblationKind, AblationSource, check_kind
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.batches import Batch
from oa_train.checks import check_positive
from oa_train.circuits.circuit import Circuit
from oa_train.engine.chunks import ROWS_PER_RUN
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.metrics.measures import LOSS_SIGNS, Loss, check_loss
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.levels import Level
from oa_train.models.selection import Nodes
from oa_train.models.sites import DEFAULT_SITES, check_dictionaries, check_site_kinds
from oa_train.models.spec import BUILT_IN, LMSpec
from oa_train.seeds import derive_seed
from oa_train.shapes import Float, Tensor
from oa_train.training.metric_averages import CircuitMeans
from oa_train.training.optimizers import LRSchedulerCallable, OptimizerCallable
from oa_train.training.settings import as_list
from oa_train.training.side_by_side import SideBySideModule
from oa_train.training.strategies import share_from_first_process

# Number of sets of constants that the first validation compares with the trained ones.
MOST_CANDIDATES = 3

# Largest number of ablated entries of a circuit that a checkpoint lists by name.
MOST_LISTED = 100


class ConstantsModule(SideBySideModule):
    """Finds the best constant replacements of the units outside a fixed circuit.

    The constants of units that are ablated alone are trained in parallel on the same prompts; each row of a batch uses
    and updates only those of its own unit, so this is equivalent to a separate job for each unit.

    Exactly one of `circuit`, `keep` and `alone` determines what is ablated.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: recorded only; nothing here is random.
        circuit: folder of a circuit, or of a run that has one; everything outside it is ablated.
        keep: names or shell patterns of the units that are kept; all others are ablated.
        alone: names or shell patterns of units, each of which is ablated alone (`*` for all).
        sites: with `keep` and `alone`, kinds of site whose units these are; see `CircuitModule`.
        dictionaries: sparse autoencoders, whose features are the units of the kind `features`.
        start: initial constants: `mean`, `zero` or `counterfactual_mean`, or a folder of constants, or of a run that
            has some.
        loss: `kl`, `cross_entropy` or `logit_difference`; see `CircuitModule`.
        positions: size of the constants' table; 1 gives each unit one constant.
        learning_rate: initial learning rate.
        optimizer: class of the optimiser, with its arguments except `lr`; Adam by default.
        lr_scheduler: class of a schedule of the rate, with its arguments; by default cosine decay to zero over the
            whole training. It is stepped after every optimiser step, `ReduceLROnPlateau` after every epoch.
        patience: early stopping after this many validations in which no circuit's loss fell by 1 %; off by default.
        rows_per_run: most rows (circuits times prompts) whose activations are kept at once; bounds memory, changes no
            result.
        recompute: activation checkpointing of each decoder block; less memory, more time, the same result.

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
        sites: list[str] = [*DEFAULT_SITES],  # noqa: B006 (never changed)
        dictionaries: list[DictionarySpec] | None = None,
        start: str = "mean",
        loss: Loss = "kl",
        positions: int = 1,
        learning_rate: float = 0.01,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        patience: int | None = None,
        rows_per_run: int = ROWS_PER_RUN,
        recompute: bool = False,
    ) -> None:
        arguments = dict(locals())
        options = {"circuit": circuit, "keep": keep, "alone": alone}
        chosen = [name for name, value in options.items() if value is not None]
        if len(chosen) != 1:
            raise ConfigurationError(
                f"Give exactly one of circuit (a folder), keep (components) and alone (components); given: "
                f"{', '.join(chosen) or 'none'}."
            )
        if circuit is not None and (dictionaries or set(sites) != set(DEFAULT_SITES)):
            raise ConfigurationError(
                f"circuit is {circuit!r}, whose own sites and dictionaries are used; leave sites and dictionaries out."
            )
        check_loss("loss", loss)
        check_positive(positions=positions, learning_rate=learning_rate, rows_per_run=rows_per_run)
        check_positive(patience=patience)
        starts_from = Constants.load(_inside(start, "constants")) if Path(start).is_dir() else _start_kind(start)
        check_site_kinds("sites", sites)
        check_dictionaries(sites, len(dictionaries or []))
        loaded = [spec.load() for spec in dictionaries or []]
        super().__init__(arguments, optimizer, lr_scheduler)
        self.loss: Loss = loss
        self.positions = positions
        self.learning_rate = learning_rate
        self.patience = patience
        self.recompute = recompute
        self.start = start
        self._starts_from = starts_from
        if circuit is not None:
            self.circuits = {"circuit": Circuit.load(_inside(circuit, "circuit"))}
            check_belongs(self.frozen, self.circuits["circuit"], None)
        else:
            patterns = as_list(keep if keep is not None else alone or [])
            nodes = Nodes.of(self.frozen.config, sites, patterns, loaded)
            kept = {"circuit": Circuit.from_patterns(nodes, patterns)} if keep is not None else None
            self.circuits = kept or _each_alone(nodes, patterns)
        self.level: Level = next(iter(self.circuits.values())).level
        masks = torch.stack([fixed.mask for fixed in self.circuits.values()])
        zeros = [Constants.zeros(self.level, positions)]
        self.fitted = FittedCircuits(self.level, masks, zeros, loss, rows_per_run, recompute)
        if not self.fitted.has_constants:
            raise ConfigurationError(
                f"{chosen[0]} is {options[chosen[0]]!r}, which keeps everything: there are no constants to train."
            )
        self.constants_started = nn.Buffer(torch.tensor(False))
        self.progress = nn.Buffer(torch.full((len(self.circuits),), torch.inf))
        self.stale: Tensor = nn.Buffer(torch.tensor(0))
        # Alternatives to the trained constants, which the first validation compares: the start, means and zeros.
        self._candidates: list[TrainableConstants] = []
        self.losses = CircuitMeans(1 + MOST_CANDIDATES, len(self.circuits))

    @property
    def each_alone(self) -> bool:
        """True if each circuit ablates a single unit."""
        return "circuit" not in self.circuits

    def describe(self) -> dict[str, Any]:
        """Ablated units, start, positions and loss."""
        return {
            "level": self.level.identity(),
            "ablated": {name: _digest(circuit.level.kept(~circuit.mask)) for name, circuit in self.circuits.items()},
            "start": self.start if isinstance(self._starts_from, AblationKind) else "constants",
            "positions": self.positions,
            "loss": self.loss,
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The constants of all circuits."""
        return [{"params": list(self.fitted.constants.parameters()), "lr": self.learning_rate}]

    def on_train_start(self) -> None:
        """Restore the state that Lightning does not; end at once if patience had run out."""
        super().on_train_start()
        self._stop_when_stale()

    def on_fit_start(self) -> None:
        """Initialise the constants unless restored, and the candidates for best: start, means and zeros."""
        if self.patience is not None and self.trainer.limit_val_batches == 0:
            raise ConfigurationError("patience counts validations, and trainer.limit_val_batches is 0.")
        started = bool(self.constants_started)
        if started and self.fitted.best.known():
            return
        source = AblationSource(self.frozen, self.data.task, self.level, self.positions, self.track)
        start = self._starting_constants(source)
        if not started:
            self.fitted.constants.load(start)
            self.constants_started.fill_(True)
            share_from_first_process(self.fitted.constants.parameters())
        # The means are the usual start, which need not be evaluated twice.
        candidates = [start, source.zero] if start is source.mean else [start, source.mean, source.zero]
        self._candidates = [self.fitted.candidate(constants) for constants in candidates]

    def _starting_constants(self, source: AblationSource) -> Constants:
        if isinstance(self._starts_from, Constants):
            check_belongs(self.frozen, next(iter(self.circuits.values())), self._starts_from)
            return self._starts_from.with_positions(self.positions)
        prepared = self._starts_from.prepare(source)
        assert isinstance(prepared, Constants)
        return prepared

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of all circuits."""
        runs = self.fitted.runs(self.frozen, batch)
        return self.step_of_parts([("train/loss", run.circuits, run.losses) for run in runs], batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the current constants and, at the first validation, of the candidates."""
        self._evaluate(batch, [self.fitted.constants.sets(), *(candidate.sets() for candidate in self._candidates)])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the best constants."""
        self._evaluate(batch, [self._best_sets()])

    def predict_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, "circuit prompt scored vocabulary"]:
        """Logits under the best constants at the scored positions; `trainer.predict` runs the test prompts."""
        logits = circuit_logits(self.frozen, batch, self.level, self.fitted.masks, self._best_sets())
        return logits.view(len(self.circuits), len(batch), *logits.shape[1:])

    def _evaluate(self, batch: Batch, tables: Sequence[Sequence[Constants]]) -> None:
        # Every process runs the same number of circuits at once, although batches may differ by a prompt, because all
        # processes run a sharded model together.
        rows = len(batch) * max(1, self.fitted.rows_per_run // self.data.task.evaluation_batch_size)
        losses = [
            circuit_behaviour(self.frozen, [batch], self.level, self.fitted.masks, sets, rows).loss(self.loss)
            for sets in tables
        ]
        self.losses.update(torch.stack(losses).mean(dim=2).to(self.device), len(batch))

    def on_validation_epoch_end(self) -> None:
        """Keep each circuit's best constants; the best checkpoint minimises the mean of their losses."""
        losses = self.losses.taken()
        if self.trainer.sanity_checking:  # on a few prompts, not comparable with later losses
            return
        for candidate, loss in zip(self._candidates, losses[1:], strict=False):
            self.fitted.best.offer(candidate, loss)
        self._candidates = []
        self.fitted.best.offer(self.fitted.constants, losses[0])
        self.log(f"val/{self.loss}", LOSS_SIGNS[self.loss] * losses[0].mean(), prog_bar=True, sync_dist=True)
        self.log("val/objective", self.fitted.best.loss.mean(), sync_dist=True)
        least = torch.where(self.progress.isfinite(), NOTICEABLE * self.progress.abs(), 0.0)
        fallen = self.fitted.best.loss < self.progress - least
        self.progress[fallen] = self.fitted.best.loss[fallen]
        self.stale = torch.zeros_like(self.stale) if bool(fallen.any()) else self.stale + 1
        self._stop_when_stale()

    def _stop_when_stale(self) -> None:
        if self.patience is not None and int(self.stale) >= self.patience:
            self.trainer.should_stop = True

    def on_test_epoch_end(self) -> None:
        """Report the mean over circuits."""
        self.log(f"test/{self.loss}", LOSS_SIGNS[self.loss] * self.losses.taken()[0].mean(), sync_dist=True)

    def trained_circuits(self) -> list[TrainedCircuit]:
        """The circuit, named "circuit", or one for each unit that is ablated alone, with the best constants."""
        constants = self.best_constants()
        circuits = self.circuits if self.each_alone else {"circuit": self.circuit()}
        return [TrainedCircuit(name, circuit, constants) for name, circuit in circuits.items()]

    def circuit(self) -> Circuit:
        """The circuit for which constants were trained; its ablation is now optimal, whatever it was trained under.

        Raises:
            ConfigurationError: units were ablated alone.
        """
        if self.each_alone:
            raise ConfigurationError("Constants of units that were ablated alone belong to no circuit.")
        circuit = self.circuits["circuit"]
        return replace(circuit, provenance={**circuit.provenance, **self._optimal_provenance()})

    def _optimal_provenance(self) -> dict[str, Any]:
        return self.provenance() | {"ablation": "optimal", "loss": self.loss}

    def _best_sets(self) -> list[Constants]:
        return self.fitted.best.sets() if self.fitted.best.known() else self.fitted.constants.sets()

    def best_constants(self) -> Constants:
        """The best constants by validation, or the last ones without one; units ablated alone share one set."""
        (constants,) = self._best_sets()
        return replace(constants.detach().to("cpu"), provenance=self._optimal_provenance())


def _each_alone(nodes: Nodes, patterns: list[str]) -> dict[str, Circuit]:
    ablated = nodes.select(patterns)
    if not ablated:
        raise ConfigurationError(f"alone is {patterns}, which selects no component; * selects all.")
    return {name: Circuit.from_mask(nodes, ~nodes.mask([name])) for name in ablated}


def _digest(names: Sequence[str]) -> str:
    """The names if there are few, else their number and a hash."""
    listed = " ".join(names)
    return listed if len(names) <= MOST_LISTED else f"{len(names)} entries, {derive_seed(listed):016x}"


def _start_kind(name: str) -> AblationKind:
    """The ablation whose constants the training starts from."""
    kinds = [kind.name for kind in ABLATION_KINDS.values() if kind.constant and not kind.learned]
    if name not in kinds:
        raise ConfigurationError(
            f"start is {name!r}, which is not a folder of constants either. {nearest_names(name, kinds)}"
        )
    return check_kind("start", name)


def _inside(folder: str, artefact: str) -> Path:
    """Folder of an artefact, given its own path or that of its run."""
    path = Path(folder)
    return path / artefact if (path / artefact).is_dir() else path
