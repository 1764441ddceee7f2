"""Lightning's command line around our modules, tasks and run folders."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from oa_train.ablations.clean_ability import ability_before_training
from oa_train.checks import check_at_least
from oa_train.cli.bars import track
from oa_train.cli.faults import Claim, building, told_how_to_resume
from oa_train.cli.output import console, show
from oa_train.cli.parser import (
    ExplainingLightningParser,
    add_config,
    add_model_and_task,
    check_values,
    link_model,
    make_paths_absolute,
)
from oa_train.cli.quiet import silence_libraries
from oa_train.cli.run_log import record_in
from oa_train.errors import DONE, CheckpointError, ConfigurationError
from oa_train.models.loading import load_config
from oa_train.models.spec import LMSpec
from oa_train.studies.earlier_runs import checkpoint_to_go_on_from, finished_results, is_same_experiment
from oa_train.studies.finish import finish_fit
from oa_train.studies.finish_circuits import FinishSettings
from oa_train.studies.run_folder import RunFolder, check_experiment, output_root
from oa_train.training import slurm
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint, MaskImages
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from oa_train.training.interruption import StopAtSignal, none_left_behind, terminable
from oa_train.training.module import FrozenModelModule
from oa_train.training.progress_lines import training_bar
from oa_train.training.strategies import ShardedStrategy
from oa_train.training.trainer_options import check_intervals, check_trainer_options, trainer_changes

DEFAULT_ROOT = "runs"

# Tells the processes that a distributed strategy starts which run folder the first process has claimed.
RUN_FOLDER_VARIABLE = "OA_TRAIN_RUN_FOLDER"

# Keys of a fit's options that do not describe the experiment.
_NOT_RECORDED = ("config", "ckpt_path", "weights_only", "verbose")

_CKPT_PATH = (
    "checkpoint file to resume or evaluate, such as runs/<experiment>/version_<N>/checkpoints/last.ckpt; `validate` "
    "and `test` also find a run's own by --run and --ckpt"
)


class OaTrainCLI(LightningCLI):
    """LightningCLI whose `model` is one of our modules and whose `data` is a task.

    Args:
        command: the only subcommand that is set up, because the parsers of the others would take time.
        words: options of the subcommand.
    """

    def __init__(self, command: str, words: list[str]) -> None:
        silence_libraries()
        self._command = command
        # Read before this process itself puts its folder into the environment.
        self._is_started = RUN_FOLDER_VARIABLE in os.environ
        self.run_folder: RunFolder | None = None
        self._claim: Claim | None = None
        self._checkpoint: dict[str, Any] | None = None
        super().__init__(
            model_class=FrozenModelModule,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "oa-train"},
            trainer_defaults={"max_epochs": 20, "log_every_n_steps": 10, "num_sanity_val_steps": 0},
            args=[command, *words],
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, with errors that name the nearest options."""
        parser = ExplainingLightningParser(**kwargs)
        add_config(parser)
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # a static method of Lightning's
        """The trainer's method, and those of its arguments that are not options."""
        return {self._command: {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders"}}

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        next(action for action in parser._actions if action.dest == "ckpt_path").help = _CKPT_PATH
        if subcommand != "fit":
            # Replaced by the run's configuration before the parser sees them; added only to be listed in the help.
            for name, meaning in (("run", "folder of a run"), ("ckpt", "checkpoint: best (default), last, a path")):
                parser.add_argument(f"--{name}", type=str | None, default=None, help=meaning)
        return parser

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise ConfigurationError(f"seed_everything is {seed}; expected an integer from 0 to {2**32 - 1}.")
        super()._set_seed()

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the trainer; the module and the task follow."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the model's name, the task, and the settings of the end of a fit."""
        # The task comes first, in place of Lightning's datamodule: bad prompts are refused before the model is loaded.
        add_model_and_task(parser)
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)
        link_model(parser, ("model", "data"))
        for name, kind, default, meaning in (
            ("experiment", str, "circuit", "results go to <default_root_dir>/<experiment>/version_<N>"),
            ("checkpoint_every", int, 25, "optimiser steps between two writes of checkpoints/last.ckpt"),
            ("resumed_from", str | None, None, "checkpoint from which this run was resumed; only recorded"),
            ("slurm_job", str | None, None, "SLURM job to which this run belongs; only recorded"),
        ):
            parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
        parser.add_class_arguments(FinishSettings, "finish")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's values override the configuration."""

    @property
    def _is_first(self) -> bool:
        """True for the only process or the first one of several, whatever has started them."""
        return getattr(rank_zero_only, "rank", 0) == 0 and not self._is_started

    @property
    def _writes(self) -> bool:
        """True if there will be a run folder."""
        return self.subcommand == "fit" and not self.config[self.subcommand].trainer.fast_dev_run

    def instantiate_classes(self) -> None:
        """Build the module, the task's datamodule and the trainer."""
        chosen = self.config[self.subcommand]
        check_values(self._parser(self.subcommand), chosen)
        make_paths_absolute(chosen)
        check_trainer_options(chosen.trainer, LMSpec(**vars(chosen.lm)))
        check_experiment(chosen.experiment)
        if self._writes:
            output_root("trainer.default_root_dir", str(chosen.trainer.default_root_dir or DEFAULT_ROOT))
            output_root("experiment", str(self._experiment_folder()))
        check_at_least(1, checkpoint_every=chosen.checkpoint_every)
        self._say(*slurm.ignore_stray_ranks(chosen.trainer))
        if chosen.ckpt_path is None and self.subcommand != "fit":
            raise ConfigurationError(
                f"{self.subcommand} needs a trained module: give --run, the folder of a run, or --ckpt_path, a file."
            )
        if self._writes and slurm.is_restarted():
            # The command line's checkpoint is where the job began; the job's own is more advanced.
            checkpoint, messages = checkpoint_to_go_on_from(self._experiment_folder(), self._recorded())
            self._say(*messages)
            chosen.ckpt_path = chosen.ckpt_path if checkpoint is None else str(checkpoint)
        elif self._writes and chosen.ckpt_path is not None:
            self._end_if_finished(Path(chosen.ckpt_path))
        if chosen.ckpt_path is not None:
            self._checkpoint = _read_named(chosen.ckpt_path)  # before the model is loaded
        with building():
            load_config(LMSpec(**vars(chosen.lm)))  # a missing model is reported before its missing tokenizer
            super().instantiate_classes()
        self.datamodule = TaskData(self.datamodule)

    def _end_if_finished(self, checkpoint: Path) -> None:
        """End here if a checkpoint is of a finished run and the configuration is the same as that run's."""
        run = RunFolder(checkpoint.parent.parent)
        if checkpoint.is_file() and finished_results(run) and is_same_experiment(run, self._recorded()):
            self._say(
                f"{run.path} is finished already, so nothing was done. To continue its training, change what ended it "
                "(--trainer.max_epochs, --trainer.max_steps); with any option that differs from that run's it is "
                "resumed in a new version."
            )
            raise SystemExit(DONE)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build the trainer and claim a run folder for it; `fast_dev_run` and evaluation have none."""
        config = self._get(self.config_init, "trainer")
        self._check_against_module(config)
        plugins = _as_list(config.plugins)
        self._signals = slurm.stop_signals(plugins)
        kwargs |= trainer_changes(config)
        kwargs["plugins"] = [WholeFileCheckpointIO(), *plugins, *slurm.slurm_environment(plugins, config.strategy)]
        if not self._writes:
            kwargs |= {"logger": False, "enable_checkpointing": False}
            return self._trainer(default_root_dir=str(self._experiment_folder()), **kwargs)
        self.run_folder = run = self._claimed_run()
        if self._is_first:
            run.save_config(self._recorded())
            record_in(run.path)
            if config.enable_progress_bar is not False:
                self.model.track = track
        return self._trainer(
            logger=self._loggers(config.logger, run),
            callbacks=[*_as_list(config.callbacks), *self._callbacks(config, run.path)],
            # Under SLURM Lightning resumes from any job's checkpoint in the root; this run's own folder has none.
            default_root_dir=str(run.path),
            **kwargs,
        )

    def _check_against_module(self, config: Any) -> None:
        """Make the checks that need the module: of the checkpoint, sizes, and intervals."""
        if self._checkpoint is not None:
            self.model.check_checkpoint(self._checkpoint, self.datamodule)
            changes = self.model.changed_settings(self._checkpoint) if self.subcommand == "fit" else ()
            self._say(*(f"changed since the checkpoint: {change}" for change in changes))
        size = self._get(self.config_init, "finish").size
        if isinstance(self.model, CircuitModule) and size is not None:
            self.model.masks.check_size(size)
        check_intervals(config, self.datamodule.batches_per_epoch)

    def _loggers(self, loggers: Any, run: RunFolder) -> Any:
        if loggers not in (None, True):
            return loggers
        root, experiment = run.path.parent.parent, run.path.parent.name
        return [kind(root, name=experiment, version=run.version) for kind in (TensorBoardLogger, CSVLogger)]

    def _callbacks(self, config: Any, run: Path) -> Iterator[Callback]:
        last = LastCheckpoint(run / "checkpoints", self._get(self.config_init, "checkpoint_every"))
        yield from (BestCheckpoint(run / "checkpoints"), last, StopAtSignal(last, self._signals), MaskImages())
        if config.enable_progress_bar is not False:
            yield training_bar(track)

    def _trainer(self, **kwargs: Any) -> Any:
        with self._given_up_after_a_refusal():
            try:
                return super().instantiate_trainer(**kwargs)
            except (ValueError, TypeError) as problem:
                raise ConfigurationError(f"The trainer cannot be built from these options: {problem}") from problem

    def _given_up_after_a_refusal(self) -> AbstractContextManager[None]:
        return nullcontext() if self._claim is None else self._claim.given_up_after_a_refusal()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run with the folder's name in the environment, where the processes that a strategy starts find it."""
        run, path = self.run_folder, self.config[subcommand].ckpt_path
        if run is None:
            super()._run_subcommand(subcommand)
        elif not self._is_first:
            with told_how_to_resume(self._shared_run):
                super()._run_subcommand(subcommand)
        else:
            resumed_from = None if path is None else Path(path)
            resuming = told_how_to_resume(lambda: run, resumed_from, lambda: run.save_config(self._recorded()))
            os.environ[RUN_FOLDER_VARIABLE] = str(run.path)
            try:
                with self._given_up_after_a_refusal(), slurm.requeued(), resuming:
                    super()._run_subcommand(subcommand)
            finally:
                del os.environ[RUN_FOLDER_VARIABLE]

    def _shared_run(self) -> RunFolder:
        """The run folder as another process has learned it from the first one."""
        callbacks = self.trainer.checkpoint_callbacks
        best = next(callback for callback in callbacks if isinstance(callback, BestCheckpoint))
        assert best.dirpath is not None
        return RunFolder(Path(best.dirpath).parent)

    def before_fit(self) -> None:
        """Print how well the clean model does the task, unless it is sharded: a single process cannot run it then."""
        strategy = self.trainer.strategy
        if self.run_folder is None or not self._is_first or isinstance(strategy, ShardedStrategy):
            return
        if self._checkpoint is None:
            self.model.frozen.to(strategy.root_device)
            self._say(*ability_before_training(self.model.frozen, self.datamodule.task, track=self.model.track))

    def after_fit(self) -> None:
        """Finish the training result, with the best checkpoint."""
        first, strategy = self.trainer.is_global_zero, self.trainer.strategy
        sharded = isinstance(strategy, ShardedStrategy)
        if self.run_folder is None or not (first or sharded):
            return
        # A sharded model needs all processes to run it. They compute the same; the files of the first one are kept.
        with none_left_behind(self.trainer) if sharded else nullcontext():
            best = self.run_folder.checkpoint("best")
            state = read_checkpoint(best)["state_dict"] if first and best.is_file() else None
            state = strategy.broadcast(state) if sharded else state
            if state is not None:
                self.model.load_state_dict(state, strict=False)
            # Lightning moves the module back to the CPU at the end.
            self.model.to(strategy.root_device)
            with (
                terminable(self._signals),
                nullcontext(self.run_folder.path) if first else TemporaryDirectory() as folder,
            ):
                settings = self._get(self.config_init, "finish")
                finished = finish_fit(self.model, self.datamodule.task, Path(folder), settings)
        if first:
            if state is None:
                console.print(f"There is no {best}, so the last state was finished, not the best.", soft_wrap=True)
            if finished is not None:
                show(finished)
            console.print(f"run: {self.run_folder.path}", soft_wrap=True)

    def _recorded(self) -> dict[str, Any]:
        """The whole configuration, which reproduces the run."""
        config = self.config[self.subcommand].clone()
        config.resumed_from = config.ckpt_path
        config.slurm_job = slurm.slurm_job()
        text = self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)
        return {key: value for key, value in yaml.safe_load(text).items() if key not in _NOT_RECORDED}

    def _experiment_folder(self) -> Path:
        chosen = self.config[self.subcommand]
        return Path(chosen.trainer.default_root_dir or DEFAULT_ROOT).expanduser() / str(chosen.experiment)

    def _claimed_run(self) -> RunFolder:
        experiment, claimed = self._experiment_folder(), os.environ.get(RUN_FOLDER_VARIABLE)
        if claimed is not None:
            return RunFolder(Path(claimed))
        if not self._is_first:
            # Other processes write nothing, and learn the folder when the checkpoint callback broadcasts it.
            return RunFolder(experiment / "version_of_the_first_process")
        self._claim = Claim(experiment.parent, experiment.name)
        return self._claim.run

    def _say(self, *messages: str) -> None:
        for message in messages if self._is_first else ():
            console.print(message, soft_wrap=True)


def _read_named(path: str) -> dict[str, Any]:
    if path in ("best", "last", "hpc", "registry"):
        raise CheckpointError(
            f"--ckpt_path is {path!r}, which Lightning would look for in a run that has not begun. Name the file: "
            f"runs/<experiment>/version_<N>/checkpoints/{path}.ckpt."
        )
    return read_checkpoint(Path(path))


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
