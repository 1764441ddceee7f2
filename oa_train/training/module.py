"""Base class of the Lightning modules: a frozen model, which checkpoints leave out."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from oa_train.artefacts import versions
from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.errors import CheckpointError, ConfigurationError, NotFiniteError
from oa_train.models.loading import CausalLM, LMSpec, fingerprint, load_model
from oa_train.models.sharding import shard
from oa_train.progress import Track, silent
from oa_train.tasks.task import Task
from oa_train.training.checkpoints import IDENTITY_KEY, check_identity, read_checkpoint
from oa_train.training.data import TaskData
from oa_train.training.strategies import ShardedStrategy, check_strategy

FROZEN_PREFIX = "frozen."


class FrozenModelModule(lightning.LightningModule):
    """A Lightning module around a frozen language model.

    The model is a submodule, so that Lightning moves it to the device, but it stays in evaluation mode, has no
    gradients and is left out of `state_dict` and `parameters`. A checkpoint names its fingerprint instead, and is
    refused by a module of another model, component set, mask distribution or task.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: seeds every draw of this module; the same seed gives the same run, also across a resume.

    Attributes:
        lm: the specification of the frozen model.
        frozen: the model.
        track: progress bar for passes over prompts outside of the trainer's steps; silent by default.
        keeps_best: whether the state holds the best parameters so far, so that averaging weights makes no sense.
    """

    keeps_best: ClassVar[bool] = False

    def __init__(self, lm: LMSpec, seed: int) -> None:
        super().__init__()
        self.lm = lm
        self.seed = seed
        self.track: Track = silent
        self.frozen: CausalLM = load_model(self.lm)
        self.fingerprint = fingerprint(self.frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen_weights)
        # State that Lightning's checkpoints leave out, from loading until the training begins.
        self._to_restore: Mapping[str, Any] = {}

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is trained, as plain values; a checkpoint with another description is refused."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments that rebuild this module, as plain values."""

    def setup(self, stage: str) -> None:
        """Refuse options of the trainer that cannot work.

        Raises:
            ConfigurationError: validations would be 0 batches or epochs apart, or a callback cannot average this.
        """
        del stage
        for name in ("val_check_interval", "check_val_every_n_epoch"):
            if getattr(self.trainer, name) == 0:
                raise ConfigurationError(f"trainer.{name} is 0; expected more (limit_val_batches 0: no validation).")
        for callback in self._callbacks(WeightAveraging, StochasticWeightAveraging):
            name, own = type(callback).__name__, type(self).__name__
            if self.keeps_best:
                raise ConfigurationError(f"{own} keeps what is best by validation, not averages; leave {name} out.")
            if getattr(callback, "_use_buffers", False):
                raise ConfigurationError(f"{name} would average counters and flags too; set its use_buffers to false.")

    def _callbacks(self, *kinds: type[Callback]) -> list[Any]:
        trainer: Any = self.trainer
        return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]

    def configure_model(self) -> None:
        """Shard the frozen model, if the strategy does so.

        Raises:
            ConfigurationError: strategy or precision would change what is trained.
        """
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin
        check_strategy(strategy)
        if isinstance(precision, (HalfPrecision, DoublePrecision)):
            raise ConfigurationError(
                f"precision is {precision.precision!r}, which would change the data type of what is trained; that is "
                "always float32. The data type of the frozen model is lm.dtype, with precision 32-true."
            )
        if isinstance(strategy, ShardedStrategy):
            shard(self.frozen, strategy.device_mesh["data_parallel"])

    def train(self, mode: bool = True) -> "FrozenModelModule":
        """Switch to training mode; the frozen model stays in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override] # the overloads of torch
        """All parameters and buffers but those of the frozen model."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "") + FROZEN_PREFIX
        # In place: a module around this one, such as an average, collects its state in the same dictionary.
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        return state

    def named_modules(self, memo: set[nn.Module] | None = None, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """All submodules but the frozen model's, so that `parameters` and `buffers` lack its weights as well.

        Callbacks that average weights would round them, and DDP would send them to processes that have them.
        """
        memo = set() if memo is None else memo
        memo.add(self.frozen)
        yield from super().named_modules(memo, *args, **kwargs)

    def provenance(self) -> dict[str, Any]:
        """Model, task and versions, for the header of an artefact."""
        return {
            "model": self.lm.name,
            "revision": self.lm.revision,
            "family": self.frozen.config.model_type,
            "fingerprint": self.fingerprint,
            "task": self.data.task.describe(),
            "bos_token_id": self.data.task.bos_token_id,
            "seed": self.seed,
        }

    @property
    def data(self) -> TaskData:
        """The datamodule of the attached trainer.

        Raises:
            ConfigurationError: the trainer runs with bare dataloaders.
        """
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, TaskData):
            raise ConfigurationError(
                f"{type(self).__name__} needs a TaskData datamodule, because it draws prompts for means as well: "
                "trainer.fit(module, datamodule=TaskData(task))."
            )
        return data

    def _accumulated_in(self, epoch: int) -> int:
        """Batches that are accumulated for an optimiser step of an epoch."""
        schedulers = self._callbacks(GradientAccumulationScheduler)
        return schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else self.trainer.accumulate_grad_batches

    def planned_steps(self) -> float:
        """Optimiser steps of the whole training, at least 1; infinite when nothing ends it.

        Lightning's own estimate would create the dataloader before a checkpoint is restored, at its beginning.
        """
        trainer, by_epochs = self.trainer, math.inf
        if trainer.max_epochs not in (None, -1):
            in_epochs = [self._accumulated_in(epoch) for epoch in range(trainer.max_epochs)]
            by_epochs = sum(math.ceil(self.data.epoch_length / accumulated) for accumulated in in_epochs)
        return max(1, by_epochs if trainer.max_steps == -1 else min(by_epochs, trainer.max_steps))

    def batches_of_step(self, batch_idx: int) -> range:
        """Indices, in the epoch, of the batches that are accumulated in the same optimiser step as this one."""
        accumulated = self.trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % accumulated
        return range(first, min(first + accumulated, self.data.epoch_length))

    def share_of_step(self, batch_idx: int) -> float:
        """Factor on a batch's loss that makes the accumulated loss the mean over the batches of its step.

        Lightning divides by `accumulate_grad_batches`, even in a step that has fewer at the end of an epoch.
        """
        return self.trainer.accumulate_grad_batches / len(self.batches_of_step(batch_idx))

    @staticmethod
    def share_from_first_process(tensors: Iterable[torch.Tensor]) -> None:
        """Broadcast tensors from rank 0: sums on a GPU may differ in their last bits."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), src=0)

    def over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over all processes, without gradients.

        A value that is not finite in one process makes the mean so in all, which then stop at the same step.
        """
        reduced = self.trainer.strategy.reduce(tensor.detach().clone(), reduce_op="mean")
        assert isinstance(reduced, torch.Tensor)
        return reduced

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the identity of the training, and the state that Lightning leaves out.

        Raises:
            NotFiniteError: a trained tensor is not finite; no checkpoint is written.
        """
        self.check_finite(self.named_trainables(), "The trained tensors")
        trainer, gradients = self.trainer, {}
        if trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop._should_accumulate():
            trained = self.named_trainables().items()
            gradients = {name: self.over_processes(p.grad) for name, p in trained if p.grad is not None}
        checkpoint[IDENTITY_KEY] = {
            "identity": self._identity() | {"task": self.data.task.describe()},
            "settings": self.settings(),
            "versions": versions(),
            "epoch_length": self.data.epoch_length,
            "figures": {name: figure.item() for name, figure in trainer.callback_metrics.items()},
            "gradients": gradients,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, these components and this task, and is complete.

        Raises:
            CheckpointError: it is not, or a training would go on from it in epochs of another length.
        """
        data = getattr(self._trainer, "datamodule", None)
        self.check_checkpoint(checkpoint, data.task if isinstance(data, TaskData) else None)
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._to_restore = checkpoint[IDENTITY_KEY]
        length, now = self._to_restore.get("epoch_length"), self.data.epoch_length
        if length not in (None, now):
            raise CheckpointError(
                f"The checkpoint was written in epochs of {length} batches; this configuration has epochs of {now}.\n"
                "Resume with the same data.batches_per_epoch and trainer.limit_train_batches, or train anew."
            )

    def on_train_start(self) -> None:
        """Restore the state that Lightning's checkpoints leave out, as if the training had not been interrupted."""
        trainer, restored, self._to_restore = self.trainer, self._to_restore, {}
        trainer.accumulate_grad_batches = self._accumulated_in(trainer.current_epoch)
        for name, figure in restored.get("figures", {}).items():  # callbacks may ask for them before a validation
            trainer.callback_metrics[name] = torch.tensor(figure, device=self.device)
        parameters = self.named_trainables()
        for name, gradient in restored.get("gradients", {}).items():
            parameters[name].grad = gradient.to(self.device)
        if restored and self._callbacks(StochasticWeightAveraging):
            rank_zero_warn("A resume with StochasticWeightAveraging is not exact; with EMAWeightAveraging it is.")
        if restored and any(stopping.wait_count >= stopping.patience for stopping in self._callbacks(EarlyStopping)):
            trainer.should_stop = True

    def check_checkpoint(self, checkpoint: Mapping[str, Any], task: Task | None) -> None:
        """Check that a checkpoint can be loaded into this module.

        Args:
            checkpoint: its content.
            task: the task that it must be of; None leaves that open.

        Raises:
            CheckpointError: it is of another model, component set, mask distribution or task, or is incomplete.
        """
        stored = checkpoint.get(IDENTITY_KEY)
        if not isinstance(stored, dict) or not {"identity", "settings"} <= stored.keys():
            raise CheckpointError("This is not a checkpoint of oa_train: it has no identity or settings.")
        check_identity(stored["identity"], self._identity() | ({"task": task.describe()} if task is not None else {}))
        own = self.state_dict()
        names, expected = set(checkpoint["state_dict"]), set(own)
        if names != expected:
            raise CheckpointError(
                f"The checkpoint is incomplete or of another version: missing {sorted(expected - names)}, "
                f"unexpected {sorted(names - expected)}."
            )
        tensors = [*checkpoint["state_dict"].items(), *stored.get("gradients", {}).items()]
        for name, tensor in tensors:
            if name not in own or tensor.shape != own[name].shape:
                expected_shape = list(own[name].shape) if name in own else "no such tensor"
                raise CheckpointError(
                    f"The checkpoint is damaged: {name} has the shape {list(tensor.shape)}; expected {expected_shape}."
                )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's method, after the checks that every checkpoint must pass.

        Raises:
            CheckpointError: it is missing, damaged, or of something else.
        """
        read_checkpoint(Path(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def changed_settings(self, checkpoint: Mapping[str, Any]) -> list[str]:
        """Settings in which this module differs from the one that wrote a checkpoint, one per line."""
        stored, settings = checkpoint[IDENTITY_KEY]["settings"], self.settings()
        return [f"{name}: {stored.get(name)} -> {now}" for name, now in settings.items() if stored.get(name) != now]

    def _identity(self) -> dict[str, Any]:
        """Description that a checkpoint must share with the run that it is loaded into; the task is apart."""
        return {"module": type(self).__name__, "model": {"fingerprint": self.fingerprint}, **self.describe()}

    def named_trainables(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def check_finite(self, tensors: Mapping[str, torch.Tensor], label: str, batch: Batch | None = None) -> None:
        """Stop when a tensor holds NaN or infinity.

        Args:
            tensors: by name.
            label: plural noun for the tensors, which begins the message.
            batch: prompts that they were computed on; if the frozen model fails on them, the message says so.

        Raises:
            NotFiniteError: names the tensors that are not finite.
        """
        bad = ", ".join(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
        if not bad:
            return
        with torch.no_grad():
            logits = scored_logits(self.frozen, batch) if batch is not None else torch.zeros(())
            # A model may rule tokens out, with logits of -inf.
            sound = not bool((logits.isnan() | logits.isposinf()).any())
        if sound:
            raise NotFiniteError(
                f"{label} are no longer finite: {bad}.\nLower the learning rates, clip gradients "
                "(--trainer.gradient_clip_val 1.0) or train in float32."
            )
        raise NotFiniteError(
            f"{label} are not finite: {bad}.\nThe logits of the frozen model itself are not finite on these prompts: "
            f"its weights hold NaN or infinity, or it overflows in its data type (lm.dtype {self.lm.dtype})."
        )


def _expect_no_frozen_weights(module: nn.Module, keys: Any) -> None:
    """Do not report the frozen model's weights as missing, even inside another module."""
    del module
    keys.missing_keys[:] = [name for name in keys.missing_keys if FROZEN_PREFIX not in name]


def as_list(patterns: str | list[str]) -> list[str]:
    """Patterns as a list, also where there is only one."""
    return [patterns] if isinstance(patterns, str) else patterns


def check_positive(**values: float) -> None:
    """Check that options are more than 0.

    Raises:
        ConfigurationError: an option is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise ConfigurationError(f"{name} is {value}; expected more than 0.")
