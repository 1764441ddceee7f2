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
    """Id of this process's SLURM job, or of its task in a job array; None elsewhere and in interactive sessions."""
    job = SLURMEnvironment.job_id()
    if job is None:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return str(job) if array is None or task is None else f"{array}_{task}"


def slurm_environment(plugins: Sequence[Any], strategy: Any) -> list[ClusterEnvironment]:
    """The environment that Lightning would detect under SLURM, unless the user has chosen one, without its requeueing.

    That writes a checkpoint inside a signal handler, to a folder in which every other job would look.
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
    """Signals that end a fit: SIGTERM, and in a SLURM job its requeue signal, unless Lightning handles that."""
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
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as problem:
        answer = " ".join([str(problem), *(getattr(problem, "stderr", None) or "").split()])
        return f"Job {job} could not be requeued and does not go on by itself: {answer}"
    return f"SLURM has requeued job {job}, which will go on by itself."


def is_restarted() -> bool:
    """True if SLURM has started this job before: it was requeued, preempted, or lost its node."""
    return slurm_job() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def checkpoint_to_go_on_from(folder: Path, config: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """Last checkpoint of the latest run of this job with this configuration, and messages about it.

    Damaged checkpoints are passed over, so that one of them does not end every further start of the job.

    Args:
        folder: holds the runs, `version_<N>`.
        config: configuration of this run, as it would be recorded.
    """
    job, messages = slurm_job(), []
    numbers = [run.name.removeprefix(f"{VERSION}_") for run in folder.glob(f"{VERSION}_*")]
    for number in sorted(filter(str.isdecimal, numbers), key=int, reverse=True):
        run = RunFolder(folder / f"{VERSION}_{number}")
        checkpoint = run.checkpoint("last")
        if not checkpoint.is_file() or not is_same_experiment(run, config, job):
            continue
        try:
            read_checkpoint(checkpoint)
        except CheckpointError:
            messages.append(f"{checkpoint} is damaged and is passed over.")
            continue
        return checkpoint, [*messages, f"SLURM has started job {job} again; it resumes from {checkpoint}."]
    return None, [*messages, f"SLURM has started job {job} again, but it left no checkpoint; it begins as it did."]


def is_same_experiment(run: RunFolder, config: Mapping[str, Any], job: str | None = None) -> bool:
    """True if a run has this configuration and, if one is given, belongs to this job."""
    try:
        recorded = read_config(run.config_path)
    except ConfigurationError:
        return False
    same = {**recorded, **dict.fromkeys(RECORDS)} == {**config, **dict.fromkeys(RECORDS)}
    return same and job in (None, recorded.get("slurm_job"))
