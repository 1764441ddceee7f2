"""What all Lightning modules of this package share: a frozen model that no checkpoint holds."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from torch import nn

from oa_train.artefacts import versions
from oa_train.errors import CheckpointError, ConfigurationError, NotFiniteError
from oa_train.models.loading import CausalLM, LMSpec, fingerprint, load_model
from oa_train.models.sharding import shard
from oa_train.progress import Track, silent
from oa_train.tasks.task import Task
from oa_train.training.checkpoints import IDENTITY_KEY, check_identity
from oa_train.training.data import TaskData
from oa_train.training.strategies import ShardedStrategy, check_strategy

FROZEN_PREFIX = "frozen."


class FrozenModelModule(lightning.LightningModule):
    """A Lightning module around a frozen language model.

    The model is a submodule, so that Lightning moves it to the device, but it stays in evaluation mode, has no
    gradients and is left out of `state_dict`. A checkpoint instead names its fingerprint, and is refused by a module
    of another model, component set, mask distribution or task.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: seeds every draw of this module; the same seed gives the same run, also across a resume.

    Attributes:
        lm: the specification of the frozen model.
        frozen: the model.
        track: shows the progress of passes over prompts that are no steps of the trainer; silent unless it is set.
    """

    def __init__(self, lm: LMSpec, seed: int) -> None:
        super().__init__()
        self.lm = lm
        self.seed = seed
        self.track: Track = silent
        self.frozen: CausalLM = load_model(self.lm)
        self.fingerprint = fingerprint(self.frozen)
        # The state dict lacks the frozen weights on purpose; `on_load_checkpoint` checks that nothing else is amiss.
        self.strict_loading = False
        # Every process has loaded the same weights. DDP would send them around at the start, and their buffers before
        # every step.
        frozen = (*self.frozen.named_parameters(), *self.frozen.named_buffers())
        self._ddp_params_and_buffers_to_ignore = [f"{FROZEN_PREFIX}{name}" for name, _ in frozen]

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What this module trains, as plain values; a checkpoint with another description is refused."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments that build this module again, as plain values."""

    def configure_model(self) -> None:
        """Share the frozen model out among the processes, where the strategy is to do so.

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
        # In place: a module around this one (an average of weights, say) reads what it has handed over to be filled.
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        return state

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

    def planned_steps(self) -> float:
        """Optimiser steps of the whole training; infinite when nothing ends it.

        Lightning's own estimate would make the dataloader before a checkpoint is restored, which then begins anew.
        """
        trainer = self.trainer
        in_epoch = math.ceil(self.data.epoch_length / trainer.accumulate_grad_batches)
        by_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs * in_epoch
        return by_epochs if trainer.max_steps == -1 else min(by_epochs, trainer.max_steps)

    def batches_of_step(self, batch_idx: int) -> range:
        """Numbers, in the epoch, of the batches that are accumulated for the same optimiser step as this one."""
        accumulated = self.trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % accumulated
        return range(first, min(first + accumulated, self.data.epoch_length))

    def share_of_step(self, batch_idx: int) -> float:
        """What a batch's loss is multiplied with, so that its step has the mean over the batches that there are.

        Lightning divides by `accumulate_grad_batches`, also where an epoch ends with fewer.
        """
        return self.trainer.accumulate_grad_batches / len(self.batches_of_step(batch_idx))

    @staticmethod
    def share_from_first_process(tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the first one's values: sums on a GPU may differ in their last bits."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), src=0)

    def over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes, without gradients; a figure of a step is that of all its prompts.

        What is not finite in one process is so in all, which then stop at the same step.
        """
        reduced = self.trainer.strategy.reduce(tensor.detach().clone(), reduce_op="mean")
        assert isinstance(reduced, torch.Tensor)
        return reduced

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the checkpoint is of; refuse to write one that is not finite."""
        self.check_finite(self.named_trainables(), "The trained tensors")
        checkpoint[IDENTITY_KEY] = {
            "identity": self._identity() | {"task": self.data.task.describe()},
            "settings": self.settings(),
            "versions": versions(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, these components and this task, and is complete."""
        attached = self._trainer is not None and isinstance(getattr(self.trainer, "datamodule", None), TaskData)
        self.check_checkpoint(checkpoint, self.data.task if attached else None)

    def check_checkpoint(self, checkpoint: Mapping[str, Any], task: Task | None) -> None:
        """Check that a checkpoint can be loaded into this module.

        Args:
            checkpoint: what was read.
            task: the task that it must be of; None leaves that open.

        Raises:
            CheckpointError: it is of another model, component set, mask distribution or task, or is incomplete.
        """
        stored = checkpoint.get(IDENTITY_KEY)
        if not isinstance(stored, dict) or not {"identity", "settings"} <= stored.keys():
            raise CheckpointError("This is not a checkpoint of oa_train: it does not say what it is of.")
        expected_identity = self._identity() | ({"task": task.describe()} if task is not None else {})
        check_identity(stored["identity"], expected_identity)
        given, expected = set(checkpoint["state_dict"]), set(self.state_dict())
        if given != expected:
            raise CheckpointError(
                f"The checkpoint is incomplete or of another version: missing {sorted(expected - given)}, "
                f"unexpected {sorted(given - expected)}."
            )

    def changed_settings(self, checkpoint: Mapping[str, Any]) -> list[str]:
        """Settings in which this module differs from the one that wrote a checkpoint, a line each."""
        stored = checkpoint[IDENTITY_KEY]["settings"]
        return [
            f"{name}: {stored.get(name)} -> {now}" for name, now in self.settings().items() if stored.get(name) != now
        ]

    def _identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that it is loaded into, the task apart."""
        return {"module": type(self).__name__, "model": {"fingerprint": self.fingerprint}, **self.describe()}

    def named_trainables(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @staticmethod
    def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """Stop when a tensor holds NaN or infinity.

        Raises:
            NotFiniteError: names the tensors that are not finite.
        """
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise NotFiniteError(
                f"{what} are no longer finite: {', '.join(bad)}.\nThe last good checkpoint is untouched. Lower the "
                "learning rates, clip gradients (--trainer.gradient_clip_val 1.0) or train in float32."
            )

    def lm_settings(self) -> dict[str, Any]:
        """The specification of the frozen model as plain values."""
        return asdict(self.lm)
