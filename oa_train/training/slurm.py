"""SLURM jobs: their ids, ranks, signals and requeueing."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from oa_train.errors import ConfigurationError
from oa_train.training.interruption import Stopped

# Sent by SLURM before the time limit if the job asks for it (sbatch --signal=USR1@60).
REQUEUE_SIGNAL = signal.SIGUSR1

# Variables from which Lightning takes the rank of a process.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")

_SECONDS_TO_ANSWER = 60


def slurm_job() -> str | None:
    """Id of this process's SLURM job, or of its task in a job array; None elsewhere and in interactive sessions."""
    job = SLURMEnvironment.job_id()
    if job is None:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return str(job) if array is None or task is None else f"{array}_{task}"


def slurm_environment(plugins: Sequence[Any], strategy: Any) -> list[ClusterEnvironment]:
    """The environment that Lightning would detect under SLURM, without its requeueing; none if the user chose one.

    That requeueing writes a checkpoint inside a signal handler, to a folder in which every other job would look.
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


def ignore_stray_ranks(config: Any) -> list[str]:
    """Remove the rank from the environment if no launcher has started several processes; returns lines that report it.

    A shell inside an allocation sets such variables, and Lightning would take the run for a process whose rank is not
    0, which writes nothing. If several processes are asked for, the variables are an error.
    """
    # The user's plugins may include another environment; torchrun and several SLURM tasks set these correctly.
    if config.plugins or TorchElasticEnvironment.detect() or "MASTER_ADDR" in os.environ:
        return []
    stray = [name for name in _RANKS if os.environ.get(name, "0") != "0"]
    if not stray or (SLURMEnvironment.detect() and os.environ.get("SLURM_NTASKS", "1") != "1"):
        return []
    shown = ", ".join(f"{name}={os.environ[name]}" for name in stray)
    if config.num_nodes > 1 or str(config.devices) not in ("auto", "1"):
        raise ConfigurationError(
            f"{shown} in the environment makes this process another's helper, but neither torchrun nor srun has "
            f"started several. Unset it: unset {' '.join(stray)}"
        )
    for name in stray:
        del os.environ[name]
    rank_zero_only.rank = 0  # type: ignore[attr-defined]
    return [f"{shown} in the environment is ignored: nothing has started several processes."]


def stop_signals(plugins: Sequence[Any] = ()) -> tuple[signal.Signals, ...]:
    """Signals that end a fit: SIGTERM, and in a SLURM job its requeue signal, unless Lightning handles that."""
    by_lightning = any(isinstance(plugin, SLURMEnvironment) and plugin.auto_requeue for plugin in plugins)
    requeues = slurm_job() is not None and not by_lightning
    return (signal.SIGTERM, REQUEUE_SIGNAL) if requeues else (signal.SIGTERM,)


@contextmanager
def requeued() -> Iterator[None]:
    """Ask SLURM to start the job again if the requeue signal ended the work inside; a note on it says so."""
    try:
        yield
    except Stopped as stop:
        job = slurm_job()
        if stop.signal is REQUEUE_SIGNAL and job is not None:
            # SLURM ends the processes of a job that it requeues. This one is about to end, and still has to report it.
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
