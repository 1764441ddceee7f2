"""Runs that are killed, interrupted, or told to end: what they say, and that they are resumed to the last bit."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from oa_train.studies.run_folder import RunFolder
from oa_train.training.checkpoints import read_checkpoint
from tests.jobs.fits import (
    FIRST,
    SECOND,
    SECONDS,
    assert_ended_alike,
    done,
    finished,
    process_id,
    start,
    statuses,
    torchrun,
    wait_until,
)

LAST = FIRST / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Runs that were never interrupted, by their number of processes."""

    @cache
    def made(n_processes: int) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted")
        finished(start(folder, n_processes=n_processes), folder)
        return folder / FIRST

    return made


QUICK_KILLS = [(1, 0)]
KILLS = [(1, attempt) for attempt in range(20)] + [(2, attempt) for attempt in range(10)]


@pytest.mark.parametrize(
    ("n_processes", "attempt"),
    [kill if kill in QUICK_KILLS else pytest.param(*kill, marks=pytest.mark.long) for kill in KILLS],
)
def test_killed_at_a_random_step_and_resumed_it_ends_bit_for_bit_the_same(tmp_path, n_processes, attempt, whole_runs):
    uninterrupted = whole_runs(n_processes)
    first = start(tmp_path, n_processes=n_processes)
    wait_until((tmp_path / LAST).exists, first, tmp_path)
    time.sleep(random.uniform(0, 1.2))
    with suppress(ProcessLookupError):  # it may have ended
        os.killpg(first.pid, signal.SIGKILL)
    assert first.wait(timeout=SECONDS) in (-signal.SIGKILL, 0)
    finished(start(tmp_path, "--ckpt_path", str(LAST), n_processes=n_processes), tmp_path)
    assert_ended_alike(tmp_path / SECOND, uninterrupted, LAST)


# Who gets the signal, and who has started the processes.
WAYS = [
    "one process",
    "the first of two",
    pytest.param("one worker of torchrun", marks=pytest.mark.long),
    # Sends the signal on, as it does in the way before to the worker that had none.
    pytest.param("the agent of torchrun", marks=pytest.mark.long),
]


@pytest.mark.parametrize("way", WAYS)
def test_told_to_end_all_processes_end_at_one_step_and_are_resumed_bit_for_bit(tmp_path, way, whole_runs):
    n_processes = 1 if way == "one process" else 2
    launcher = torchrun(2) if "torchrun" in way else ["-m"]
    # When another process has ended, Lightning would kill the first one within five seconds, and torchrun tells it to
    # end at once.
    slow = {"LINGER": "6"} if n_processes > 1 else {}
    run = start(tmp_path, n_processes=n_processes, launcher=launcher, environment=slow)
    wait_until((tmp_path / LAST).exists, run, tmp_path)
    os.kill(process_id(tmp_path, 1) if way == "one worker of torchrun" else run.pid, signal.SIGTERM)
    status = run.wait(timeout=SECONDS)
    said = (tmp_path / "said.txt").read_text()
    # The agent of torchrun fails when a worker did not end with 0.
    assert status == (1 if "torchrun" in way else 143), said
    assert statuses(tmp_path) == dict.fromkeys(range(n_processes), 143), said
    if way == "one worker of torchrun":
        assert "exitcode  : 143" in said
    assert said.count(RunFolder(FIRST).resume_command()) == 1
    assert 0 < read_checkpoint(tmp_path / LAST)["global_step"] < 60
    finished(start(tmp_path, "--ckpt_path", str(LAST), n_processes=n_processes), tmp_path)
    assert_ended_alike(tmp_path / SECOND, whole_runs(n_processes), LAST)


@pytest.mark.parametrize("n_processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_told_to_end_while_it_prepares_a_run_ends_and_says_how_it_starts_again(tmp_path, n_processes):
    # Without progress bars the preparation would not be recorded.
    bars = ("--trainer.enable_progress_bar", "true", "--data.n_means", "20000")
    run = start(tmp_path, *bars, n_processes=n_processes)
    log = tmp_path / FIRST / "run.log"
    wait_until(lambda: log.exists() and "averaging activations" in log.read_text(), run, tmp_path)
    sent = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=SECONDS) == 143, (tmp_path / "said.txt").read_text()
    if n_processes == 1:
        assert time.monotonic() - sent < 5
    assert statuses(tmp_path) == dict.fromkeys(range(n_processes), 143)
    words = (tmp_path / "said.txt").read_text()
    assert f"This starts again:\n  oa-train fit --config {FIRST}/config.yaml" in words
    assert not (tmp_path / LAST).exists()


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "SIGTERM", marks=pytest.mark.long),
    ],
)
def test_a_run_that_is_interrupted_says_how_to_resume(tmp_path, sent, status, said):
    run = start(tmp_path, "--trainer.max_epochs", "500")
    wait_until((tmp_path / LAST).exists, run, tmp_path)
    run.send_signal(sent)
    assert run.wait(timeout=60) == status
    words = (tmp_path / "said.txt").read_text()
    assert said in words
    assert "Traceback" not in words
    assert read_checkpoint(tmp_path / LAST)["global_step"] > 0
    assert RunFolder(FIRST).resume_command() in words
    log = (tmp_path / FIRST / "run.log").read_text()
    assert log.splitlines()[-1].strip().startswith("oa-train fit --config runs/")


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_an_interrupted_refit_is_finished_by_the_command_that_it_says(tmp_path, sent, status):
    # Without progress bars the passes after the training would not be recorded.
    bars = ("--trainer.enable_progress_bar", "true", "--quiet")
    # After so few steps the masks keep everything, and a circuit that keeps everything needs no refit.
    size = ("--finish.size", "7")
    run = start(tmp_path, "--trainer.max_epochs", "1", "--finish.refit.steps", "100000", *size, *bars)
    folder = tmp_path / FIRST
    log = folder / "run.log"
    wait_until(lambda: log.exists() and "refitting the constants" in log.read_text(), run, tmp_path)
    time.sleep(0.5)
    run.send_signal(sent)
    assert run.wait(timeout=60) == status
    words = (tmp_path / "said.txt").read_text()
    command = RunFolder(FIRST).resume_command()
    assert command in words
    assert "Traceback" not in words
    assert (folder / "circuit").is_dir()
    assert not (folder / "constants").exists()
    more = [*command.split()[1:], "--finish.refit.steps", "1", "--quiet"]
    assert done(tmp_path, *more) == ""
    assert (tmp_path / SECOND / "studies" / "fit_0" / "results.json").is_file()
    steps = [read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt")["global_step"] for run in (FIRST, SECOND)]
    assert steps == [20, 20]
