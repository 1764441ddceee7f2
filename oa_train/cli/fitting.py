"""`oa-train fit`, `validate` and `test`: Lightning's command line around our modules."""

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table

from oa_train.artefacts import make_next_folder, replace_file
from oa_train.cli.arguments import (
    CONFIG_FILE,
    ExplainingLightningParser,
    add_model_and_task,
    check_configs,
    check_groups,
    configs_first,
    refuse_stored_trust,
    run_folder,
    take_option,
)
from oa_train.cli.faults import faults_explained, lost_peers_explained
from oa_train.cli.interruption import resumable, terminable
from oa_train.cli.output import console, front_table, listed_names, metrics_table, track
from oa_train.cli.quiet import silence_libraries
from oa_train.cli.record import record_in
from oa_train.cli.requeue import (
    checkpoint_to_go_on_from,
    is_restarted,
    requeued,
    slurm_environment,
    slurm_job,
    stop_signals,
)
from oa_train.cli.trainer import DEFAULT_ROOT, check_intervals, check_trainer, trainer_changes
from oa_train.errors import CheckpointError, ConfigurationError, nearest_names
from oa_train.studies.constants import finish_constants
from oa_train.studies.finish import FinishSettings, finish
from oa_train.studies.front import finish_front
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint, MaskImages
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.data import TaskData
from oa_train.training.interruption import StopAtSignal, none_left_behind
from oa_train.training.module import FrozenModelModule
from oa_train.training.strategies import ShardedStrategy

# Tells the processes that a distributed strategy starts which folder the first one has made.
RUN_FOLDER_VARIABLE = "OA_TRAIN_RUN_FOLDER"

# In the configuration of a fit, but not an option that describes the experiment.
_NOT_RECORDED = ("config", "ckpt_path", "weights_only", "verbose")


class OaTrainCLI(LightningCLI):
    """LightningCLI whose `model` is one of our modules and whose `data` is a task.

    Args:
        command: the one subcommand that is set up; the parsers of the others would only take time.
        **options: of LightningCLI.
    """

    def __init__(self, command: str, **options: Any) -> None:
        self._command = command
        super().__init__(**options)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, with errors that name the nearest options."""
        parser = ExplainingLightningParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="configuration file; may be given several times")
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # a static method of Lightning's
        """What Lightning's trainer does here, and which of its arguments are no options."""
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
            raise ConfigurationError(f"seed_everything is {seed}; expected a whole number from 0 to {2**32 - 1}.")
        super()._set_seed()

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the trainer and the module; the task takes the place of Lightning's datamodule."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the model's name, the task and what comes after the fit."""
        add_model_and_task(parser, ("model", "data"))
        parser.add_argument(
            "--experiment",
            type=str,
            default="circuit",
            help="results go to <default_root_dir>/<experiment>/version_<N>",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=25,
            help="optimiser steps between two writes of checkpoints/last.ckpt",
        )
        parser.add_argument(
            "--resumed_from", type=str | None, default=None, help="checkpoint that this run went on from; a record"
        )
        parser.add_argument(
            "--slurm_job", type=str | None, default=None, help="SLURM job that this run belongs to; a record"
        )
        parser.add_class_arguments(FinishSettings, "finish")

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: Lightning would let the checkpoint's values overrule it."""

    def instantiate_classes(self) -> None:
        """Build the module, the task's datamodule and the trainer."""
        chosen = self.config[self.subcommand]
        check_groups(self._parser(self.subcommand), chosen)
        check_trainer(chosen)
        if chosen.checkpoint_every < 1:
            raise ConfigurationError(f"checkpoint_every is {chosen.checkpoint_every}; expected at least 1.")
        if chosen.ckpt_path is None and self.subcommand != "fit":
            raise ConfigurationError(
                f"{self.subcommand} needs a trained module: give --run, the folder of a run, or --ckpt_path, a file."
            )
        if self.subcommand == "fit" and not chosen.trainer.fast_dev_run and is_restarted():
            # A checkpoint that the command line names is where the job began; it has come further since.
            chosen.ckpt_path = self._checkpoint_of_this_job() or chosen.ckpt_path
        if chosen.ckpt_path is not None:
            _check_checkpoint(chosen.ckpt_path)  # before the model is loaded
        super().instantiate_classes()
        self.datamodule = TaskData(self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build the trainer around a run folder that is made for it; `fast_dev_run` and evaluation have none."""
        config = self._get(self.config_init, "trainer")
        given = self.config[self.subcommand].ckpt_path
        if given is not None:
            checkpoint = read_checkpoint(Path(given))
            self.model.check_checkpoint(checkpoint, self.datamodule)
            told = self.subcommand == "fit" and _is_first_process()
            for change in self.model.changed_settings(checkpoint) if told else ():
                console.print(f"changed since the checkpoint: {change}", soft_wrap=True)
        size = self._get(self.config_init, "finish").size
        if isinstance(self.model, CircuitModule) and size is not None:
            self.model.masks.check_size(size)
        check_intervals(config, self.datamodule.batches_per_epoch)
        plugins = _as_list(config.plugins)
        self._signals = stop_signals(plugins)
        plugins = [WholeFileCheckpointIO(), *plugins, *slurm_environment(plugins, config.strategy)]
        self.run: Path | None = None
        if self.subcommand != "fit" or config.fast_dev_run:
            return self._trainer(
                logger=False,
                enable_checkpointing=False,
                plugins=plugins,
                default_root_dir=str(self._experiment_folder()),
                **trainer_changes(config),
                **kwargs,
            )
        self.run = _make_run_folder(self._experiment_folder())
        if _is_first_process():
            self._save_config(self.run)
            record_in(self.run)
        if _is_first_process() and config.enable_progress_bar is not False:
            self.model.track = track
        loggers = config.logger
        if loggers in (None, True):
            root, experiment = self.run.parent.parent, self.run.parent.name
            version = int(self.run.name.removeprefix("version_"))
            loggers = [kind(root, name=experiment, version=version) for kind in (TensorBoardLogger, CSVLogger)]
        every = self._get(self.config_init, "checkpoint_every")
        last = LastCheckpoint(self.run / "checkpoints", every)
        callbacks: list[Callback] = [
            BestCheckpoint(self.run / "checkpoints"),
            last,
            StopAtSignal(last, self._signals),
            MaskImages(),
        ]
        if config.enable_progress_bar is not False:
            callbacks.append(RichProgressBar())
        return self._trainer(
            logger=loggers,
            plugins=plugins,
            callbacks=[*_as_list(config.callbacks), *callbacks],
            # Under SLURM Lightning resumes from what any job has left in the root: only this run's folder holds none.
            default_root_dir=str(self.run),
            **trainer_changes(config),
            **kwargs,
        )

    def _trainer(self, **kwargs: Any) -> Any:
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as problem:
            if self.run is not None and _is_first_process():  # else it is another process's
                shutil.rmtree(self.run)
            raise ConfigurationError(f"The trainer cannot be built from these options: {problem}") from problem

    def _run_subcommand(self, subcommand: str) -> None:
        """Run with the folder's name in the environment, where processes that a strategy starts find it."""
        if self.run is None:
            super()._run_subcommand(subcommand)
            return
        if not _is_first_process():
            with lost_peers_explained(self._shared_run):
                super()._run_subcommand(subcommand)
            return
        run, given = self.run, self.config[self.subcommand].ckpt_path
        resumed_from = None if given is None else Path(given)
        os.environ[RUN_FOLDER_VARIABLE] = str(run)
        try:
            with (
                requeued(),
                resumable(run, resumed_from),
                faults_explained(run, resumed_from, lambda: self._save_config(run)),
            ):
                super()._run_subcommand(subcommand)
        finally:
            del os.environ[RUN_FOLDER_VARIABLE]

    def _shared_run(self) -> Path:
        """The run folder as another process has learned it from the first one."""
        best = next(one for one in self.trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint))
        assert best.dirpath is not None
        return Path(best.dirpath).parent

    def after_fit(self) -> None:
        """Finish what was trained, with the best checkpoint."""
        first, strategy = self.trainer.is_global_zero, self.trainer.strategy
        if self.run is None or not (first or isinstance(strategy, ShardedStrategy)):
            return
        best = self.run / "checkpoints" / "best.ckpt"
        # All processes are needed to run a model that is shared out. They compute the same; the first one's files
        # are kept.
        shared = isinstance(strategy, ShardedStrategy)
        with none_left_behind(self.trainer) if shared else nullcontext():
            state = read_checkpoint(best)["state_dict"] if first and best.is_file() else None
            state = strategy.broadcast(state) if shared else state
            if state is not None:
                self.model.load_state_dict(state, strict=False)
            # Lightning moves the module back to the CPU when it is done.
            self.model.to(strategy.root_device)
            with terminable(self._signals), nullcontext(self.run) if first else TemporaryDirectory() as folder:
                said = self._finished(Path(folder))
        if first:
            if state is None:
                console.print("No validation took place, so the last state was finished and not the best.")
            for one in (*said, f"results: {self.run}"):
                console.print(one, soft_wrap=isinstance(one, str))

    def _finished(self, run: Path) -> Sequence[Table | str]:
        """Finish what was trained, and return what there is to say about it."""
        if isinstance(self.model, CircuitModule):
            return self._finish_circuit(self.model, run)
        if isinstance(self.model, ConstantsModule):
            return self._finish_constants(self.model, run)
        return ()

    def _finish_circuit(self, module: CircuitModule, run: Path) -> Sequence[Table | str]:
        task, settings = self.datamodule.task, self._get(self.config_init, "finish")
        if module.n_circuits > 1:
            return (front_table(finish_front(module, task, run, settings, module.track), task.n_test),)
        finished = finish(module, task, run, settings, module.track)
        circuit = finished.circuit
        kept = f"{len(circuit)} of {len(circuit.level)} {circuit.level.parts}"
        table = metrics_table(f"{kept} kept, on {task.n_test} held-out prompts", finished.metrics)
        return table, f"circuit: {listed_names(circuit.names)}"

    def _finish_constants(self, module: ConstantsModule, run: Path) -> Sequence[Table | str]:
        task = self.datamodule.task
        finished = finish_constants(module, task, run, module.track)
        on = f"on {task.n_test} held-out prompts"
        if module.each_alone:
            alone = {name: figures["kl"] for name, figures in finished.metrics.items()}
            return (metrics_table(f"KL divergence in nats with one component ablated, {on}", alone),)
        circuit = module.circuits["circuit"]
        kept = f"{len(circuit)} of {len(circuit.level)} {circuit.level.parts}"
        return (metrics_table(f"{kept} kept, {on}", finished.metrics["circuit"]),)

    def _save_config(self, run: Path) -> None:
        """Record the whole configuration; with it the run can be made again."""
        replace_file(run / CONFIG_FILE, yaml.safe_dump(self._recorded(), sort_keys=False).encode())

    def _recorded(self) -> dict[str, Any]:
        config = self.config[self.subcommand].clone()
        config.resumed_from = config.ckpt_path
        config.slurm_job = slurm_job()
        text = self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)
        return {key: value for key, value in yaml.safe_load(text).items() if key not in _NOT_RECORDED}

    def _experiment_folder(self) -> Path:
        chosen = self.config[self.subcommand]
        return Path(chosen.trainer.default_root_dir or DEFAULT_ROOT, chosen.experiment)

    def _checkpoint_of_this_job(self) -> str | None:
        """Where a job that SLURM has started again goes on; the same in all its processes."""
        found, said = checkpoint_to_go_on_from(self._experiment_folder(), self._recorded())
        for line in said if _is_first_process() else ():
            console.print(line, soft_wrap=True)
        return None if found is None else str(found)


def fit(argv: Sequence[str]) -> Path | None:
    """Train, then finish; returns the run folder (None after `fast_dev_run`)."""
    return run_lightning("fit", argv)


def validate(argv: Sequence[str]) -> None:
    """Evaluate a checkpoint on the validation prompts."""
    run_lightning("validate", argv)


def test(argv: Sequence[str]) -> None:
    """Evaluate a checkpoint on the test prompts."""
    run_lightning("test", argv)


def run_lightning(command: str, argv: Sequence[str]) -> Path | None:
    """Run `fit`, `validate` or `test`.

    Args:
        command: which.
        argv: its options.

    Returns:
        The run folder of a fit, None of the others.
    """
    silence_libraries()
    words = list(argv) if command == "fit" else _expand_run(argv)
    check_configs(words)
    words = configs_first(words)
    cli = OaTrainCLI(
        command,
        model_class=FrozenModelModule,
        subclass_mode_model=True,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"allow_abbrev": False, "prog": "oa-train"},
        trainer_defaults={"max_epochs": 20, "log_every_n_steps": 10, "num_sanity_val_steps": 0},
        args=[command, *words],
    )
    return cli.run


def _expand_run(argv: Sequence[str]) -> list[str]:
    """Replace `--run DIR --ckpt best` by the configuration and checkpoint of that run."""
    given, words = take_option(argv, "--run")
    checkpoint, words = take_option(words, "--ckpt")
    if given is None:
        if checkpoint is not None:
            raise ConfigurationError("--ckpt names a checkpoint of a run; name the run with --run as well.")
        return words
    folder = run_folder(given)
    refuse_stored_trust(folder, words)
    checkpoint = checkpoint or "best"
    if checkpoint not in ("best", "last") and not Path(checkpoint).suffix and not Path(checkpoint).exists():
        sentence = nearest_names(checkpoint, ("best", "last"))
        raise ConfigurationError(f"--ckpt is {checkpoint!r}; expected best, last or the path of a file. {sentence}")
    path = folder / "checkpoints" / f"{checkpoint}.ckpt" if checkpoint in ("best", "last") else Path(checkpoint)
    return ["--config", str(folder / CONFIG_FILE), "--ckpt_path", str(path), *words]


def _check_checkpoint(given: str) -> None:
    if given in ("best", "last", "hpc", "registry"):
        raise CheckpointError(
            f"--ckpt_path is {given!r}, which Lightning would look for in a run that has not begun. Name the file: "
            f"runs/<experiment>/version_<N>/checkpoints/{given}.ckpt."
        )
    read_checkpoint(Path(given))


def _is_first_process() -> bool:
    """Whether this is the only process or the first of several, whoever started them (Lightning, torchrun, SLURM)."""
    return getattr(rank_zero_only, "rank", 0) == 0 and RUN_FOLDER_VARIABLE not in os.environ


def _make_run_folder(experiment: Path) -> Path:
    made = os.environ.get(RUN_FOLDER_VARIABLE)
    if made is not None:
        return Path(made)
    # Another process writes nothing, and learns of the folder when checkpoints are shared out; any name will do.
    return make_next_folder(experiment, "version") if _is_first_process() else experiment / "version_0"


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
