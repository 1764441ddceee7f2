"""A fit under SLURM is requeued, and goes on by itself when its job is started again."""

import os
import signal
from pathlib import Path

import pytest
import yaml

from oa_train.cli.main import main
from oa_train.training.checkpoints import read_checkpoint
from oa_train.training.interruption import Stopped
from oa_train.training.slurm import requeued, slurm_environment, slurm_job, stop_signals
from tests.jobs.fits import (
    FIRST,
    SECOND,
    SECONDS,
    SMALL,
    Process,
    assert_ended_alike,
    finished,
    free_port,
    start,
    statuses,
    wait_until,
)

LAST = FIRST / "checkpoints" / "last.ckpt"

# What SLURM tells the one process of a job.
JOB = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def scontrol(folder: Path, *lines: str) -> str:
    """Put a command `scontrol` in a folder that notes its arguments; returns a PATH that begins there."""
    command = folder / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text("\n".join(["#!/bin/sh", f'echo "$@" >> "{folder}/asked.txt"', *lines, ""]))
    command.chmod(0o755)
    return f"{command.parent}{os.pathsep}{os.environ['PATH']}"


def recorded(run: Path) -> dict[str, object]:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_job_near_its_time_limit_is_requeued_and_goes_on_to_the_last_bit(tmp_path):
    job, whole = tmp_path / "job", tmp_path / "whole"
    job.mkdir()
    whole.mkdir()
    environment = JOB | {"PATH": scontrol(tmp_path)}
    run = start(job, environment=environment)
    wait_until((job / LAST).exists, run, job)
    run.send_signal(signal.SIGUSR1)
    assert run.wait(timeout=SECONDS) == 143, (job / "said.txt").read_text()
    assert statuses(job) == {0: 143}
    assert (tmp_path / "asked.txt").read_text() == "requeue 4242\n"
    assert "SLURM has requeued job 4242" in (job / "said.txt").read_text()
    assert 0 < read_checkpoint(job / LAST)["global_step"] < 60
    assert not list(job.rglob("hpc_ckpt*"))
    said = finished(start(job, environment=environment | {"SLURM_RESTART_COUNT": "1"}), job)
    assert said.count(f"SLURM has started job 4242 again; it resumes from {LAST}.") == 1
    finished(start(whole), whole)
    assert_ended_alike(job / SECOND, whole / FIRST, LAST)
    assert recorded(job / SECOND)["slurm_job"] == "4242"


@pytest.mark.long
def test_all_tasks_of_a_job_end_and_go_on_together_and_it_is_requeued_once(tmp_path):
    job, whole = tmp_path / "job", tmp_path / "whole"
    job.mkdir()
    whole.mkdir()
    path = scontrol(tmp_path)

    def tasks(**more: str) -> list[Process]:
        shared = JOB | more | {"PATH": path, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        own = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
        return [start(job, n_processes=2, environment=shared | one) for one in own]

    first = tasks()
    wait_until((job / LAST).exists, first[0], job)
    first[1].send_signal(signal.SIGUSR1)
    assert [task.wait(timeout=SECONDS) for task in first] == [143, 143], (job / "said.txt").read_text()
    assert (tmp_path / "asked.txt").read_text() == "requeue 4242\n"
    said = [finished(task, job) for task in tasks(SLURM_RESTART_COUNT="1")]
    assert said[-1].count(f"SLURM has started job 4242 again; it resumes from {LAST}.") == 1
    finished(start(whole, n_processes=2), whole)
    assert_ended_alike(job / SECOND, whole / FIRST, LAST)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """This process as the first of a SLURM job, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return tmp_path


QUICK = [*SMALL, "--trainer.max_epochs", "1", "--data.batches_per_epoch", "4", "--finish.refit.steps", "0"]


def test_a_job_that_is_started_again_goes_on_with_its_own_newest_run_that_can_be_read(job, monkeypatch, capsys):
    def fit(*more: str) -> str:
        assert main(["fit", *QUICK, *more]) == 0
        return capsys.readouterr().out

    runs = [job / FIRST.with_name(f"version_{number}") for number in range(9)]
    # What Lightning would take for the state of this job.
    for folder in (job, job / "runs"):
        folder.mkdir(exist_ok=True)
        (folder / "hpc_ckpt_1.ckpt").write_bytes(b"of another job")
    assert "SLURM has" not in fit()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert f"it resumes from {LAST}." in fit()
    assert recorded(runs[1])["resumed_from"] == str(LAST)
    # A run of another configuration does not.
    assert "it starts as before" in fit("--model.penalty_weight", "0.3")
    assert recorded(runs[2])["resumed_from"] is None
    # So does another job.
    monkeypatch.setenv("SLURM_JOB_ID", "4243")
    assert "it starts as before" in fit()
    assert recorded(runs[3])["slurm_job"] == "4243"
    # The newest run of this job has no checkpoint, and the one before it is damaged.
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    fit()
    (runs[4] / "checkpoints" / "last.ckpt").unlink()
    (runs[1] / "checkpoints" / "last.ckpt").write_bytes(b"cut off")
    said = fit()
    assert said.count("is damaged and is skipped") == 1
    assert recorded(runs[5])["resumed_from"] == str(LAST)
    # The checkpoint that a job began with is taken when it has none of its own.
    given = str(runs[0] / "checkpoints" / "best.ckpt")
    assert "again; it resumes from runs" in fit("--ckpt_path", given)
    monkeypatch.setenv("SLURM_JOB_ID", "4244")
    assert "it starts as before" in fit("--ckpt_path", given)
    assert recorded(runs[7])["resumed_from"] == given
    # Outside of SLURM the record is not carried on.
    for name in (*JOB, "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name)
    assert main(["fit", "--config", str(runs[0] / "config.yaml")]) == 0
    assert (recorded(runs[0])["slurm_job"], recorded(runs[8])["slurm_job"]) == ("4242", None)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "No such file or directory: 'scontrol'"),
        (["echo 'Job is not allowed to be requeued' >&2", "exit 3"], "status 3. Job is not allowed to be requeued"),
    ],
)
def test_a_job_that_cannot_be_requeued_says_so(job, monkeypatch, lines, said):
    monkeypatch.setenv("PATH", "/usr/bin:/bin" if lines is None else scontrol(job, *lines))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped) as stop, requeued():
            raise Stopped(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGTERM, before)
    (note,) = stop.value.__notes__
    assert said in note
    assert "does not go on by itself" in note


def test_a_task_of_a_job_array_is_requeued_alone(job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4200")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job() == "4200_3"


def test_sigterm_requeues_nothing(job, monkeypatch):
    monkeypatch.setenv("PATH", scontrol(job))
    with pytest.raises(Stopped), requeued():
        raise Stopped(signal.SIGTERM)
    assert not (job / "asked.txt").exists()


def test_what_lightning_was_told_or_would_choose_otherwise_is_left_alone(job, monkeypatch):
    (environment,) = slurm_environment([], "ddp")
    assert environment.auto_requeue is False
    assert stop_signals([environment]) == (signal.SIGTERM, signal.SIGUSR1)
    environment.auto_requeue = True
    assert slurm_environment([environment], "auto") == []
    assert stop_signals([environment]) == (signal.SIGTERM,)
    with monkeypatch.context() as torchrun:
        torchrun.setenv("TORCHELASTIC_RUN_ID", "1")
        torchrun.setenv("RANK", "0")
        torchrun.setenv("GROUP_RANK", "0")
        torchrun.setenv("LOCAL_RANK", "0")
        torchrun.setenv("LOCAL_WORLD_SIZE", "1")
        assert slurm_environment([], "auto") == []
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert slurm_environment([], "auto") == []
    assert stop_signals() == (signal.SIGTERM,)


def test_a_job_with_tasks_that_srun_does_not_share_out_is_refused(job, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    assert main(["fit", *QUICK]) == 2
    assert "--ntasks-per-node" in capsys.readouterr().err
