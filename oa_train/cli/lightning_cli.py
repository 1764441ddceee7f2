"""Lightning's command line around our modules, tasks and run folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from oa_train.cli.bars import track
from oa_train.cli.faults import own_error, terminable, told_how_to_resume
from oa_train.cli.messages import reasons
from oa_train.cli.output import console, show
from oa_train.cli.parser import ExplainingLightningParser, add_model_and_task, check_values
from oa_train.cli.record import record_in
from oa_train.cli.slurm import (
    checkpoint_to_go_on_from,
    is_restarted,
    requeued,
    slurm_environment,
    slurm_job,
    stop_signals,
)
from oa_train.cli.trainer import DEFAULT_ROOT, check_intervals, check_trainer, ignore_stray_ranks, trainer_changes
from oa_train.errors import MISTAKE, CheckpointError, ConfigurationError, OaTrainError
from oa_train.studies.finish import Finished, FinishSettings, finish
from oa_train.studies.finish_constants import finish_constants
from oa_train.studies.run_folder import RunFolder
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint, MaskImages
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.data import TaskData
from oa_train.training.interruption import StopAtSignal, none_left_behind
from oa_train.training.strategies import ShardedStrategy

# Tells the processes that a distributed strategy starts which run folder the first one has claimed.
RUN_FOLDER_VARIABLE = "OA_TRAIN_RUN_FOLDER"

# Keys of a fit's options that do not describe the experiment.
_NOT_RECORDED = ("config", "ckpt_path", "weights_only", "verbose")


class OaTrainCLI(LightningCLI):
    """LightningCLI whose `model` is one of our modules and whose `data` is a task.

    Args:
        command: the only subcommand that is set up, because parsers of the others would take time.
        **options: of LightningCLI.
    """

    def __init__(self, command: str, **options: Any) -> None:
        self._command = command
        self.run_folder: RunFolder | None = None
        self._checkpoint: dict[str, Any] | None = None
        super().__init__(**options)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, with errors that name the nearest options."""
        parser = ExplainingLightningParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="configuration file; may be given several times")
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # a static method of Lightning's
        """The trainer's method, and those of its arguments that are no options."""
        return {self._command: {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders"}}

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            # Replaced by the run's configuration before the parser sees them; here only to be listed.
            parser.add_argument("--run", type=str | None, default=None, help="folder of a run")
            parser.add_argument(
                "--ckpt", type=str | None, default=None, help="of that run: best (default), last, a path"
            )
        return parser

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise ConfigurationError(f"seed_everything is {seed}; expected an integer from 0 to {2**32 - 1}.")
        super()._set_seed()

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the trainer and the module; the task takes the place of Lightning's datamodule."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the model's name, the task, and the settings of the end of a fit."""
        add_model_and_task(parser, ("model", "data"))
        for name, kind, default, meaning in (
            ("experiment", str, "circuit", "results go to <default_root_dir>/<experiment>/version_<N>"),
            ("checkpoint_every", int, 25, "optimiser steps between two writes of checkpoints/last.ckpt"),
            ("resumed_from", str | None, None, "checkpoint from which this run was resumed; a record"),
            ("slurm_job", str | None, None, "SLURM job to which this run belongs; a record"),
        ):
            parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
        parser.add_class_arguments(FinishSettings, "finish")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's values override the configuration."""

    def instantiate_classes(self) -> None:
        """Build the module, the task's datamodule and the trainer."""
        chosen, fits = self.config[self.subcommand], self.subcommand == "fit"
        check_values(self._parser(self.subcommand), chosen)
        check_trainer(chosen, writes=fits and not chosen.trainer.fast_dev_run)
        if chosen.checkpoint_every < 1:
            raise ConfigurationError(f"checkpoint_every is {chosen.checkpoint_every}; expected at least 1.")
        for message in ignore_stray_ranks(chosen.trainer):
            console.print(message, soft_wrap=True)
        if chosen.ckpt_path is None and not fits:
            raise ConfigurationError(
                f"{self.subcommand} needs a trained module: give --run, the folder of a run, or --ckpt_path, a file."
            )
        if fits and not chosen.trainer.fast_dev_run and is_restarted():
            # The command line's checkpoint is where the job began; its own is further on.
            chosen.ckpt_path = self._checkpoint_of_this_job() or chosen.ckpt_path
        if chosen.ckpt_path is not None:
            self._checkpoint = _read_named(chosen.ckpt_path)  # before the model is loaded
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as problem:  # the parser's, around what a constructor has raised
            if own_error(problem) is not None:
                raise
            raise ConfigurationError(
                f"An object cannot be built from these options: {reasons(str(problem))}"
            ) from problem
        self.datamodule = TaskData(self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build the trainer around a run folder that is claimed for it; `fast_dev_run` and evaluation have none."""
        config, fits = self._get(self.config_init, "trainer"), self.subcommand == "fit"
        self._check_against_module(config)
        plugins = _as_list(config.plugins)
        self._signals = stop_signals(plugins)
        plugins = [WholeFileCheckpointIO(), *plugins, *slurm_environment(plugins, config.strategy)]
        if not fits or config.fast_dev_run:
            options = {
                "logger": False,
                "enable_checkpointing": False,
                "default_root_dir": str(self._experiment_folder()),
            }
            return self._trainer(plugins=plugins, **options, **trainer_changes(config), **kwargs)
        self.run_folder = _claimed_run(self._experiment_folder())
        if _is_first_process():
            self.run_folder.save_config(self._recorded())
            record_in(self.run_folder.path)
        if _is_first_process() and config.enable_progress_bar is not False:
            self.model.track = track
        return self._trainer(
            logger=self._loggers(config.logger, self.run_folder.path),
            plugins=plugins,
            callbacks=[*_as_list(config.callbacks), *self._callbacks(config, self.run_folder.path)],
            # Under SLURM Lightning resumes from any job's checkpoint in the root; only this run's folder holds none.
            default_root_dir=str(self.run_folder.path),
            **trainer_changes(config),
            **kwargs,
        )

    def _check_against_module(self, config: Any) -> None:
        """Check what needs the module: the checkpoint, sizes, and intervals."""
        checkpoint = self._checkpoint
        if checkpoint is not None:
            self.model.check_checkpoint(checkpoint, self.datamodule)
            reports = self.subcommand == "fit" and _is_first_process()
            for change in self.model.changed_settings(checkpoint) if reports else ():
                console.print(f"changed since the checkpoint: {change}", soft_wrap=True)
        size = self._get(self.config_init, "finish").size
        if isinstance(self.model, CircuitModule) and size is not None:
            self.model.masks.check_size(size)
        check_intervals(config, self.datamodule.batches_per_epoch)

    def _loggers(self, loggers: Any, run: Path) -> Any:
        if loggers not in (None, True):
            return loggers
        root, experiment, version = run.parent.parent, run.parent.name, RunFolder(run).version
        return [kind(root, name=experiment, version=version) for kind in (TensorBoardLogger, CSVLogger)]

    def _callbacks(self, config: Any, run: Path) -> Iterator[Callback]:
        last = LastCheckpoint(run / "checkpoints", self._get(self.config_init, "checkpoint_every"))
        yield from (BestCheckpoint(run / "checkpoints"), last, StopAtSignal(last, self._signals), MaskImages())
        if config.enable_progress_bar is not False:
            yield RichProgressBar()

    def _trainer(self, **kwargs: Any) -> Any:
        with self._unclaimed_after_a_refusal():
            try:
                return super().instantiate_trainer(**kwargs)
            except (ValueError, TypeError, MisconfigurationException) as problem:
                raise ConfigurationError(f"The trainer cannot be built from these options: {problem}") from problem

    @contextmanager
    def _unclaimed_after_a_refusal(self) -> Iterator[None]:
        """Remove the run folder when options turn out to be wrong before anything was trained."""
        try:
            yield
        except (OaTrainError, MisconfigurationException, ImportError) as problem:
            is_mistake = getattr(problem, "exit_status", MISTAKE) == MISTAKE
            if (
                self.run_folder is not None
                and _is_first_process()
                and is_mistake
                and self.run_folder.last_state() is None
            ):
                shutil.rmtree(self.run_folder.path, ignore_errors=True)
            raise

    def _run_subcommand(self, subcommand: str) -> None:
        """Run with the folder's name in the environment, where processes that a strategy starts find it."""
        if self.run_folder is None:
            super()._run_subcommand(subcommand)
            return
        if not _is_first_process():
            with told_how_to_resume(self._shared_run):
                super()._run_subcommand(subcommand)
            return
        run, path = self.run_folder, self.config[subcommand].ckpt_path
        resumed_from = None if path is None else Path(path)
        os.environ[RUN_FOLDER_VARIABLE] = str(run.path)
        try:
            with (
                self._unclaimed_after_a_refusal(),
                requeued(),
                told_how_to_resume(lambda: run, resumed_from, lambda: run.save_config(self._recorded())),
            ):
                super()._run_subcommand(subcommand)
        finally:
            del os.environ[RUN_FOLDER_VARIABLE]

    def _shared_run(self) -> RunFolder:
        """The run folder as another process has learned it from the first one."""
        callbacks = self.trainer.checkpoint_callbacks
        best = next(callback for callback in callbacks if isinstance(callback, BestCheckpoint))
        assert best.dirpath is not None
        return RunFolder(Path(best.dirpath).parent)

    def after_fit(self) -> None:
        """Finish what was trained, with the best checkpoint."""
        first, strategy = self.trainer.is_global_zero, self.trainer.strategy
        sharded = isinstance(strategy, ShardedStrategy)
        if self.run_folder is None or not (first or sharded):
            return
        # A sharded model needs all processes to run it. They compute the same; the first one's files are kept.
        with none_left_behind(self.trainer) if sharded else nullcontext():
            best = self.run_folder.checkpoint("best")
            state = read_checkpoint(best)["state_dict"] if first and best.is_file() else None
            state = strategy.broadcast(state) if sharded else state
            if state is not None:
                self.model.load_state_dict(state, strict=False)
            # Lightning moves the module back to the CPU when it is done.
            self.model.to(strategy.root_device)
            with (
                terminable(self._signals),
                nullcontext(self.run_folder.path) if first else TemporaryDirectory() as folder,
            ):
                finished = self._finished(Path(folder))
        if first:
            if state is None:
                console.print(f"There is no {best}, so the last state was finished, not the best.", soft_wrap=True)
            if finished is not None:
                show(finished.findings)
            console.print(f"run: {self.run_folder.path}", soft_wrap=True)

    def _finished(self, run: Path) -> Finished | None:
        module, task = self.model, self.datamodule.task
        if isinstance(module, CircuitModule):
            settings = self._get(self.config_init, "finish")
            circuits = module.trained_circuits(settings.size)
            return finish(module.frozen, task, circuits, run, settings, module.track)
        if isinstance(module, ConstantsModule):
            return finish_constants(module.frozen, task, module.trained_circuits(), run, module.track)
        return None

    def _recorded(self) -> dict[str, Any]:
        """The whole configuration, which reproduces the run."""
        config = self.config[self.subcommand].clone()
        config.resumed_from = config.ckpt_path
        config.slurm_job = slurm_job()
        text = self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)
        return {key: value for key, value in yaml.safe_load(text).items() if key not in _NOT_RECORDED}

    def _experiment_folder(self) -> Path:
        chosen = self.config[self.subcommand]
        return Path(chosen.trainer.default_root_dir or DEFAULT_ROOT).expanduser() / str(chosen.experiment)

    def _checkpoint_of_this_job(self) -> str | None:
        """Checkpoint from which a restarted SLURM job resumes; the same in all its processes."""
        checkpoint, messages = checkpoint_to_go_on_from(self._experiment_folder(), self._recorded())
        for message in messages if _is_first_process() else ():
            console.print(message, soft_wrap=True)
        return None if checkpoint is None else str(checkpoint)


def _read_named(path: str) -> dict[str, Any]:
    if path in ("best", "last", "hpc", "registry"):
        raise CheckpointError(
            f"--ckpt_path is {path!r}, which Lightning would look for in a run that has not begun. Name the file: "
            f"runs/<experiment>/version_<N>/checkpoints/{path}.ckpt."
        )
    return read_checkpoint(Path(path))


def _is_first_process() -> bool:
    """True for the only process or the first of several, however they were started (Lightning, torchrun, SLURM)."""
    return getattr(rank_zero_only, "rank", 0) == 0 and RUN_FOLDER_VARIABLE not in os.environ


def _claimed_run(experiment: Path) -> RunFolder:
    claimed = os.environ.get(RUN_FOLDER_VARIABLE)
    if claimed is not None:
        return RunFolder(Path(claimed))
    if _is_first_process():
        return RunFolder.create(experiment.parent, experiment.name)
    # Another process writes nothing, and learns the folder when the checkpoint callback broadcasts it.
    return RunFolder(experiment / "version_of_the_first_process")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
