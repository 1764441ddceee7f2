"""SLURM jobs: their ids, requeueing, and the checkpoint from which a restarted job resumes."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from oa_train.errors import CheckpointError, ConfigurationError
from oa_train.studies.run_folder import VERSION, RunFolder, read_config
from oa_train.training.checkpoints import read_checkpoint
from oa_train.training.interruption import Stopped

# Sent by SLURM ahead of the time limit if the job asks for it (sbatch --signal=USR1@60).
REQUEUE_SIGNAL = signal.SIGUSR1

# Keys of a recorded configuration that do not describe the experiment.
RECORDS = ("resumed_from", "slurm_job")

_SECONDS_TO_ANSWER = 60


def slurm_job() -> str | None:
    """Id of the SLURM job that this process runs in, None elsewhere and in interactive sessions.

    A task of a job array is named as such: the bare id may stand for the whole array.
    """
    job = SLURMEnvironment.job_id()
    if job is None:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return str(job) if array is None or task is None else f"{array}_{task}"


def slurm_environment(plugins: Sequence[Any], strategy: Any) -> list[ClusterEnvironment]:
    """The environment that Lightning would detect under SLURM, but without its own requeueing.

    Its requeueing writes a checkpoint inside a signal handler, to a folder in which every other job would look.

    Args:
        plugins: the user's; an environment among them is left alone.
        strategy: the user's.

    Raises:
        ConfigurationError: the job's own settings cannot work.
    """
    chosen = [plugin for plugin in plugins if isinstance(plugin, ClusterEnvironment)]
    if chosen or getattr(strategy, "cluster_environment", None) is not None or slurm_job() is None:
        return []
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    try:
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as problem:
        raise ConfigurationError(f"The SLURM job cannot be used like this: {problem}") from problem


def stop_signals(plugins: Sequence[Any] = ()) -> tuple[signal.Signals, ...]:
    """Signals that end a fit: SIGTERM, and in a SLURM job its requeue signal, unless Lightning handles that.

    Args:
        plugins: of the trainer.
    """
    by_lightning = any(isinstance(plugin, SLURMEnvironment) and plugin.auto_requeue for plugin in plugins)
    requeues = slurm_job() is not None and not by_lightning
    return (signal.SIGTERM, REQUEUE_SIGNAL) if requeues else (signal.SIGTERM,)


@contextmanager
def requeued() -> Iterator[None]:
    """Ask SLURM to start the job again when the requeue signal has ended the work inside; a note says so."""
    try:
        yield
    except Stopped as stop:
        job = slurm_job()
        if stop.signal is REQUEUE_SIGNAL and job is not None:
            # SLURM ends the processes of a job that it requeues. This one is about to end, and still has to say how.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stop.add_note(_requeue(job))
        raise


def _requeue(job: str) -> str:
    """Ask SLURM to start a job again; returns a sentence about the outcome."""
    command = ["scontrol", "requeue", job]
    by_hand = "The job does not go on by itself."
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER)  # noqa: S603
    except FileNotFoundError:
        return f"SLURM's command scontrol is not on PATH, so job {job} was not requeued. {by_hand}"
    except (OSError, subprocess.TimeoutExpired) as problem:
        return f"{' '.join(command)} did not work: {problem}. {by_hand}"
    if done.returncode:
        answer = " ".join((done.stderr or done.stdout).split())
        return f"{' '.join(command)} failed with status {done.returncode}: {answer}. {by_hand}"
    return f"SLURM has requeued job {job}, which will go on by itself."


def is_restarted() -> bool:
    """True if SLURM has started this job before: it was requeued, preempted, or lost its node."""
    return slurm_job() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def checkpoint_to_go_on_from(folder: Path, config: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """Find the last checkpoint of the latest run of this job with this configuration.

    Damaged checkpoints are passed over, so that one of them does not end every further start of the job.

    Args:
        folder: holds the runs, `version_<N>`.
        config: configuration of this run, as it would be recorded.

    Returns:
        The checkpoint, None if there is none, and messages about it.
    """
    job = slurm_job()
    damaged = []
    for run in _runs(folder):
        checkpoint = run.checkpoint("last")
        if not checkpoint.is_file() or not _is_run_of(run, job, config):
            continue
        try:
            read_checkpoint(checkpoint)
        except CheckpointError:
            damaged.append(f"{checkpoint} is damaged and is passed over.")
            continue
        return checkpoint, [*damaged, f"SLURM has started job {job} again; it goes on from {checkpoint}."]
    return None, [*damaged, f"SLURM has started job {job} again, but it left no checkpoint; it begins as it did."]


def _runs(folder: Path) -> list[RunFolder]:
    """Runs of an experiment, the latest first."""
    numbered = {run.name.removeprefix(f"{VERSION}_"): run for run in folder.glob(f"{VERSION}_*")}
    return [RunFolder(numbered[number]) for number in sorted(filter(str.isdecimal, numbered), key=int, reverse=True)]


def _is_run_of(run: RunFolder, job: str | None, config: Mapping[str, Any]) -> bool:
    try:
        recorded = read_config(run.config_path)
    except ConfigurationError:
        return False
    return recorded.get("slurm_job") == job and _described(recorded) == _described(config)


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in RECORDS}
