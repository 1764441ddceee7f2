"""Base class of the Lightning modules: a frozen model, which checkpoints leave out."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import SWALR

from oa_train.artefacts import versions
from oa_train.batches import Batch
from oa_train.errors import CheckpointError, ConfigurationError
from oa_train.models.frozen import CausalLM
from oa_train.models.loading import load_model
from oa_train.models.sharding import shard
from oa_train.models.spec import LMSpec
from oa_train.models.weights import fingerprint
from oa_train.progress import Track, silent
from oa_train.tasks.task import Task
from oa_train.training.checkpoints import IDENTITY_KEY, check_identity, check_state, read_checkpoint, record_of
from oa_train.training.compatibility import check_trainer
from oa_train.training.data import TaskData
from oa_train.training.finite_check import check_finite
from oa_train.training.optimizers import LRSchedulerCallable, OptimizerCallable, configured, restore_rates
from oa_train.training.settings import as_settings, rebuilt
from oa_train.training.steps import accumulated_in
from oa_train.training.strategies import ShardedStrategy

FROZEN_PREFIX = "frozen."

# Key under which the processes of a notebook put the description of the task into the state that they hand over.
TASK_KEY = "oa_train_task"


class FrozenModelModule(lightning.LightningModule):
    """Base class of Lightning modules around a frozen language model.

    The model is a submodule, so that Lightning moves it to the device, but it stays in evaluation mode, has no
    gradients and is left out of `state_dict` and `parameters`. A checkpoint names its fingerprint instead, and is
    refused by a module of another model, component set, mask distribution or task.

    Args:
        arguments: all arguments of the subclass, including `lm` and `seed`.
        optimizer: makes the optimiser of the `parameter_groups`; None for Adam.
        lr_scheduler: makes a schedule of their learning rates; None for constant rates.

    Attributes:
        lm: the specification of the frozen model.
        seed: seeds every draw of this module; the same seed gives the same run, also across a resume.
        frozen: the model.
        track: progress bar for passes over prompts outside the trainer's steps; silent by default.
        keeps_best: whether the state holds the best parameters so far, so that averaging weights makes no sense.
        shardable: whether all processes run the frozen model the same number of times, as a sharded model needs.
    """

    keeps_best: ClassVar[bool] = False
    shardable: ClassVar[bool] = True

    def __init__(
        self,
        arguments: Mapping[str, Any],
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        self._settings = as_settings(arguments)
        self.lm: LMSpec = arguments["lm"]
        self.seed: int = arguments["seed"]
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.track: Track = silent
        self.frozen: CausalLM = load_model(self.lm)
        self.fingerprint = fingerprint(self.frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen_weights)
        # State that Lightning's checkpoints leave out, held from loading until training begins.
        self._to_restore: Mapping[str, Any] = {}
        self._described_task: Mapping[str, Any] | None = None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Description of the trained parts as plain values; a checkpoint with another description is refused."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser, with their learning rates."""

    def settings(self) -> dict[str, Any]:
        """The arguments with which this module was built, as plain values; functions are left out."""
        return dict(self._settings)

    def configure_optimizers(self) -> Any:
        """The optimiser, and the schedule if there is one; see `training.optimizers`."""
        return configured(self.optimizer or torch.optim.Adam, self.lr_scheduler, self.parameter_groups())

    def setup(self, stage: str) -> None:
        """Refuse options of the trainer that cannot work; see `check_trainer`."""
        del stage
        check_trainer(self.trainer, type(self).__name__, self.keeps_best, self.shardable)

    def configure_model(self) -> None:
        """Shard the frozen model, if the strategy does so."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            shard(self.frozen, strategy.device_mesh["data_parallel"])

    def train(self, mode: bool = True) -> "FrozenModelModule":
        """Switch to training mode; the frozen model stays in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override] # the overloads of torch
        """All parameters and buffers except those of the frozen model."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "") + FROZEN_PREFIX
        # In place: a module that wraps this one, such as an average, collects its state in the same dictionary.
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        if self._leaves_its_process():
            state[TASK_KEY] = self.described_task()
        return state

    def _leaves_its_process(self) -> bool:
        """True at the end of training in a notebook's child process, which returns nothing but the state."""
        trainer = self._trainer
        return (
            trainer is not None
            and trainer.state.finished
            and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load trained tensors and, from a notebook's child process, the description of the task."""
        self._described_task = state_dict.get(TASK_KEY, self._described_task)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def named_modules(self, memo: set[nn.Module] | None = None, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """All submodules except the frozen model's, so that `parameters` and `buffers` lack its weights as well.

        Callbacks that average weights would round them, and DDP would send them to processes that already have them.
        """
        memo = set() if memo is None else memo
        memo.add(self.frozen)
        yield from super().named_modules(memo, *args, **kwargs)

    def provenance(self) -> dict[str, Any]:
        """Model, task and versions, for the header of an artefact."""
        task = self.described_task()
        return {
            "model": self.lm.name,
            "revision": self.lm.revision,
            "family": self.frozen.config.model_type,
            "fingerprint": self.fingerprint,
            "task": task,
            "bos_token_id": task.get("bos_token_id"),
            "seed": self.seed,
        }

    def described_task(self) -> dict[str, Any]:
        """Description of the task: that of the attached trainer or, without one, of the loaded checkpoint."""
        attached = getattr(self._trainer, "datamodule", None)
        if self._described_task is not None and not isinstance(attached, TaskData):
            return dict(self._described_task)
        return self.data.task.describe()

    @property
    def data(self) -> TaskData:
        """The datamodule of the attached trainer.

        Raises:
            ConfigurationError: the trainer runs with bare dataloaders, or there is none.
        """
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, TaskData):
            raise ConfigurationError(
                f"{type(self).__name__} needs a TaskData datamodule, because it draws prompts for means as well: "
                "trainer.fit(module, datamodule=TaskData(task))."
            )
        return data

    def over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over all processes, without gradients.

        A value that is not finite in one process makes the mean non-finite in all, which then stop at the same step.
        """
        reduced = self.trainer.strategy.reduce(tensor.detach().clone(), reduce_op="mean")
        assert isinstance(reduced, torch.Tensor)
        return reduced

    def check_finite(self, tensors: Mapping[str, torch.Tensor], label: str, batch: Batch) -> None:
        """Stop when a part of the loss on these prompts is not finite; see `training.finite_check.check_finite`."""
        check_finite(tensors, label, self.frozen, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the identity of the experiment, and the state that Lightning leaves out.

        Raises:
            NotFiniteError: a trained tensor is not finite; no checkpoint is written.
        """
        trainer, trained, gradients = self.trainer, self.named_trainables(), {}
        check_finite(trained, "The trained tensors")
        if trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop._should_accumulate():
            gradients = {name: self.over_processes(p.grad) for name, p in trained.items() if p.grad is not None}
        checkpoint[IDENTITY_KEY] = {
            "identity": self._identity() | {"task": self.described_task()},
            "settings": self.settings(),
            "versions": versions(),
            "epoch_length": self.data.epoch_length,
            "optimisation": self._optimisation(),
            "figures": {name: figure.item() for name, figure in trainer.callback_metrics.items()},
            "gradients": gradients,
        }

    def _optimisation(self) -> list[str]:
        """Class names of the optimisers and schedules; their states can be restored into the same classes only."""
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        parts = (*self.trainer.optimizers, *schedules)
        # StochasticWeightAveraging replaces the schedules by its own.
        return [type(part).__name__ for part in parts if not isinstance(part, SWALR)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, these components and this task, and is complete.

        Raises:
            CheckpointError: it is not, or training would continue from it in epochs of another length.
        """
        data = getattr(self._trainer, "datamodule", None)
        self.check_checkpoint(checkpoint, data.task if isinstance(data, TaskData) else None)
        record = checkpoint[IDENTITY_KEY]
        self._described_task = record["identity"].get("task")
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if "optimizer_states" not in checkpoint:
            raise CheckpointError(
                "The checkpoint holds what was trained and not the state of its optimiser, so no training can go on "
                "from it; it was written with save_weights_only. Evaluate it, or resume from another one."
            )
        groups = [len(group["params"]) for group in self.parameter_groups() if group["params"]]
        stored = [len(group["params"]) for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
        if stored != groups:
            raise CheckpointError(
                f"The checkpoint's optimiser has groups of {stored} tensors; this module trains groups of {groups}.\n"
                "The checkpoint is damaged or of another version; train anew."
            )
        self._to_restore = record
        length, now = record.get("epoch_length"), self.data.epoch_length
        if length not in (None, now):
            raise CheckpointError(
                f"The checkpoint was written in epochs of {length} batches; this configuration has epochs of {now}.\n"
                "Resume with the same data.batches_per_epoch and trainer.limit_train_batches, or train anew."
            )

    def on_train_start(self) -> None:
        """Restore the state that Lightning's checkpoints leave out, and set the learning rates of this module.

        Raises:
            CheckpointError: the checkpoint's optimiser or schedule is of another kind.
        """
        trainer, record, self._to_restore = self.trainer, self._to_restore, {}
        before, now = record.get("optimisation"), self._optimisation()
        if before not in (None, now):
            raise CheckpointError(
                f"The checkpoint was trained with {', '.join(before)}; this configuration has {', '.join(now)}.\n"
                "Resume with the same optimizer and lr_scheduler, or train anew."
            )
        restore_rates(trainer.optimizers[0], trainer.lr_scheduler_configs, self.parameter_groups())
        trainer.accumulate_grad_batches = accumulated_in(trainer, trainer.current_epoch)
        for name, figure in record.get("figures", {}).items():  # callbacks may ask for them before a validation
            trainer.callback_metrics[name] = torch.tensor(figure, device=self.device)
        parameters = self.named_trainables()
        for name, gradient in record.get("gradients", {}).items():
            parameters[name].grad = gradient.to(self.device)
        averaging = [
            callback for callback in vars(trainer)["callbacks"] if isinstance(callback, StochasticWeightAveraging)
        ]
        if record and averaging:
            rank_zero_warn("A resume with StochasticWeightAveraging is not exact; with EMAWeightAveraging it is.")
        if record and any(stopping.wait_count >= stopping.patience for stopping in trainer.early_stopping_callbacks):
            trainer.should_stop = True

    def check_checkpoint(self, checkpoint: Mapping[str, Any], task: Task | None) -> None:
        """Check that a checkpoint can be loaded into this module, and is of a task, if one is given.

        Raises:
            CheckpointError: it is of another model, component set, mask distribution or task, or is incomplete.
        """
        expected = self._identity() | ({"task": task.describe()} if task is not None else {})
        check_identity(record_of(checkpoint)["identity"], expected)
        check_state(checkpoint, self.state_dict())

    @classmethod
    def load_from_checkpoint(  # type: ignore[override] # what Lightning offers beyond this would run code from a file
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", *, weights_only: bool = True, **arguments: Any
    ) -> Any:
        """Build the module that wrote a checkpoint, and load its trained tensors.

        No code from the file is run. The module can be evaluated, asked for its circuits, and trained further with
        `trainer.fit(module, datamodule=..., ckpt_path=...)`.

        Args:
            checkpoint_path: the file.
            map_location: device of the trained tensors.
            weights_only: must be True.
            arguments: replace arguments that the checkpoint records, such as `lm` if the model has moved. Those that
                are functions (`optimizer`, `lr_scheduler`, a user's class of masks) are not recorded.

        Raises:
            CheckpointError: the file is missing, damaged, of another module, or contradicts the arguments or model.
            ConfigurationError: an argument is unknown or cannot work.
        """
        if not weights_only:
            raise ConfigurationError("weights_only is False, which would run code from the file; leave it out.")
        checkpoint = read_checkpoint(Path(checkpoint_path), map_location)
        module = rebuilt(cls, checkpoint[IDENTITY_KEY], arguments)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module.to(next(iter(checkpoint["state_dict"].values())).device)

    def changed_settings(self, checkpoint: Mapping[str, Any]) -> list[str]:
        """Lines that name the settings in which this module differs from the one that wrote a checkpoint."""
        stored, settings = checkpoint[IDENTITY_KEY]["settings"], self.settings()
        return [f"{name}: {stored.get(name)} -> {now}" for name, now in settings.items() if stored.get(name) != now]

    def _identity(self) -> dict[str, Any]:
        """Description that a checkpoint must share with the run into which it is loaded, apart from the task."""
        return {"module": type(self).__name__, "model": {"fingerprint": self.fingerprint}, **self.describe()}

    def named_trainables(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def _expect_no_frozen_weights(module: nn.Module, keys: Any) -> None:
    """Do not report the frozen model's weights as missing, even inside another module."""
    del module
    keys.missing_keys[:] = [name for name in keys.missing_keys if FROZEN_PREFIX not in name]
