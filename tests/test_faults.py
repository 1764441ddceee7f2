"""Real faults of the machine while a run is under way: what is said, what is safe, and how the run goes on."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from oa_train.studies.run_folder import RunFolder
from oa_train.training.checkpoints import read_checkpoint
from tests.jobs.fits import (
    FIRST,
    ROOT,
    SECOND,
    SECONDS,
    Forked,
    done,
    finished,
    process_id,
    start,
    statuses,
    torchrun,
    wait_until,
)

LAST = FIRST / "checkpoints" / "last.ckpt"
LONGER = ("--trainer.max_epochs", "500")

# Starts the module named after it without root's right to pass over permissions.
WITHOUT_PRIVILEGE = (
    "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0);"  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    "os.execv(sys.executable, [sys.executable, '-m', *sys.argv[1:]])",
)

# Starts it with a small disk of its own at `runs`.
ON_A_SMALL_DISK = (
    "-c",
    "import os, sys; mount = 'mount -t tmpfs -o size=400k none runs && exec \"$@\"';"
    "os.execvp('unshare', ['unshare', '-rm', 'sh', '-c', mount, 'sh', sys.executable, '-m', *sys.argv[1:]])",
)


class Run:
    """A fit that a fault is about to hit."""

    def __init__(self, folder: Path, *more: str, n_processes: int = 1, launcher: Sequence[str] = ("-m",)) -> None:
        self.folder = folder
        self.process = start(folder, *more, n_processes=n_processes, launcher=launcher)

    def reach(self, there: Callable[[], bool]) -> None:
        wait_until(there, self.process, self.folder)

    def reach_a_checkpoint(self) -> None:
        self.reach((self.folder / LAST).is_file)

    def limit(self, what: int, most: int) -> None:
        resource.prlimit(self.process.pid, what, (most, most))

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def fails(self, *words: str, status: int = 1, runs: Path | None = None) -> str:
        """Wait for the end, which has to be a fault that is explained; returns what was said."""
        assert self.process.wait(timeout=SECONDS) == status, self.said()
        said = self.said()
        assert_is_explained(said, *words)
        assert_is_tidy(runs or self.folder / "runs")
        return said


def assert_is_explained(said: str, *words: str) -> None:
    assert "oa-train: error: " in said
    assert "Traceback" not in said
    assert "This is a fault of oa_train" not in said
    for word in words:
        assert word in said, said


def assert_is_tidy(runs: Path) -> None:
    """Check that nothing is half written: neither left-overs nor files that do not load."""
    assert not list(runs.rglob("*.partial"))
    assert not list(runs.rglob("*/.*"))
    for checkpoint in runs.rglob("*.ckpt"):
        assert read_checkpoint(checkpoint)["global_step"] > 0


@pytest.fixture
def fit(tmp_path: Path):
    """Starts fits, and ends all that is left of them."""
    started: list[Run] = []

    def begin(*more: str, n_processes: int = 1, launcher: Sequence[str] = ("-m",)) -> Run:
        started.append(Run(tmp_path, *more, n_processes=n_processes, launcher=launcher))
        return started[-1]

    yield begin
    for run in started:
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait(timeout=SECONDS)


def follow(folder: Path, said: str) -> None:
    """Do what a message says, as a user does: paste its command."""
    (command,) = re.findall(r"^  oa-train (.*)$", said, re.MULTILINE)
    done(folder, *command.split(), "--trainer.max_epochs", "1")


def test_a_full_disk_ends_the_training_and_leaves_the_checkpoint_before(tmp_path, fit):
    may = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True)
    if may.returncode:
        pytest.skip("this user may not mount a disk of its own")
    (tmp_path / "runs").mkdir()
    run = fit("--trainer.max_epochs", "500", launcher=ON_A_SMALL_DISK)
    disk = Path("/proc", str(run.process.pid), "root", *tmp_path.parts[1:], "runs")
    last = LAST.relative_to("runs")
    run.reach(lambda: (disk / last).is_file())
    # Held open, the disk outlives the process that it belongs to.
    handle = os.open(disk, os.O_RDONLY | os.O_DIRECTORY)
    kept = Path("/proc/self/fd", str(handle))
    try:
        with suppress(OSError), (kept / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
        run.fails("No space left on device", RunFolder(FIRST).resume_command(), runs=kept)
        assert not list(kept.rglob("circuit"))
        (kept / "filler").unlink()
        shutil.copytree(kept, tmp_path / "runs", dirs_exist_ok=True)
    finally:
        os.close(handle)
    follow(tmp_path, run.said())


# Size that a file may reach: last.ckpt has 21 kB, the TensorBoard log grows beyond it.
@pytest.mark.parametrize(
    ("most", "said"),
    [
        (40_000, "the TensorBoard log (events.out.tfevents.*) cannot be"),
        pytest.param(5_000, "last.ckpt cannot be written: File too large", marks=pytest.mark.long),
    ],
)
def test_a_file_that_cannot_grow_ends_the_training(fit, most, said):
    run = fit(*LONGER)
    run.reach_a_checkpoint()
    run.limit(resource.RLIMIT_FSIZE, most)
    run.fails(said, "arge", RunFolder(FIRST).resume_command())
    assert not (run.folder / FIRST / "circuit").exists()


@pytest.mark.long
def test_metrics_that_cannot_be_written_end_the_training(fit):
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "metrics")
    run = fit(*LONGER, *logger, "--trainer.log_every_n_steps", "1", "--checkpoint_every", "100000")
    run.reach(lambda: any((run.folder / "metrics").rglob("metrics.csv")))
    run.limit(resource.RLIMIT_FSIZE, 40_000)  # checkpoints stay below it
    # Only the best state has been written so far.
    run.fails("metrics.csv cannot be", RunFolder(FIRST).resume_command(FIRST / "checkpoints" / "best.ckpt"))


def test_a_disk_that_is_full_when_the_results_come_loses_only_them(fit):
    run = fit("--trainer.max_epochs", "1", "--finish.refit.steps", "60")
    run.reach((run.folder / FIRST / "circuit").is_dir)
    run.limit(resource.RLIMIT_FSIZE, 1_500)  # what is said goes to a file as well
    said = run.fails("constants cannot be written", "File too large", RunFolder(FIRST).resume_command())
    assert "results:" not in said
    assert {path.name for path in (run.folder / FIRST).iterdir() if path.is_dir()} == {"checkpoints", "circuit"}


@pytest.mark.long
def test_a_folder_that_may_no_longer_be_written_to_ends_the_training(fit):
    run = fit(*LONGER, launcher=WITHOUT_PRIVILEGE)
    run.reach_a_checkpoint()
    (run.folder / LAST).parent.chmod(0o500)
    if os.geteuid() != 0 and os.access((run.folder / LAST).parent, os.W_OK):
        pytest.skip("this user may write anywhere")
    said = run.fails("last.ckpt cannot be written: Permission denied", RunFolder(FIRST).resume_command())
    (run.folder / LAST).parent.chmod(0o700)
    follow(run.folder, said)


KILLS = [
    (1, "by Lightning"),
    pytest.param(0, "by Lightning", marks=pytest.mark.long),
    pytest.param(1, "by torchrun", marks=pytest.mark.long),
    pytest.param(0, "by torchrun", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("killed", "started"), KILLS)
def test_a_process_that_is_killed_ends_the_others_which_say_how_to_go_on(fit, killed, started):
    run = fit(*LONGER, n_processes=2, launcher=torchrun(2) if started == "by torchrun" else ("-m",))
    run.reach_a_checkpoint()
    at = time.monotonic()
    os.kill(process_id(run.folder, killed), signal.SIGKILL)
    assert run.process.wait(timeout=SECONDS) == (-signal.SIGKILL if (killed, started) == (0, "by Lightning") else 1)
    survivor = 1 - killed
    while survivor not in statuses(run.folder):
        assert time.monotonic() < at + 20, run.said()
        time.sleep(0.05)
    assert statuses(run.folder) == {survivor: 1}
    said = run.said().partition("torch/distributed/elastic")[0]
    assert_is_explained(said, "Another process of this run has ended", "it was killed", "peer")
    assert said.count("oa-train: error:") == 1
    assert f"{LAST}" in said
    assert_is_tidy(run.folder / "runs")
    if (killed, started) != (1, "by Lightning"):  # that a checkpoint of two processes goes on is shown elsewhere
        follow(run.folder, said)


@pytest.mark.parametrize(
    ("deleted", "n_processes"),
    [
        (FIRST, 1),
        pytest.param(FIRST, 2, marks=pytest.mark.long),
        pytest.param(FIRST / "checkpoints", 1, marks=pytest.mark.long),
    ],
)
def test_a_folder_that_is_deleted_gets_the_state_once_more_and_ends_the_training(fit, deleted, n_processes):
    run = fit(*LONGER, "--checkpoint_every", "100000" if n_processes == 1 else "1", n_processes=n_processes)
    run.reach((run.folder / FIRST / "metrics.csv").exists)
    # Moved away first: a file that the run writes meanwhile would keep rmtree from removing the folder.
    shutil.rmtree((run.folder / deleted).rename(run.folder / "deleted"))
    said = run.fails(
        f"The folder {FIRST}/checkpoints was deleted while the run wrote to it", RunFolder(FIRST).resume_command()
    )
    (step,) = re.findall(r"The state of step (\d+)", said)
    assert read_checkpoint(run.folder / LAST)["global_step"] == int(step) > 0
    assert (run.folder / FIRST / "config.yaml").is_file()
    if n_processes == 1:
        (command,) = re.findall(r"^  oa-train fit (.*)$", said, re.MULTILINE)
        end = ("--trainer.max_steps", str(int(step) + 1))
        finished(start(run.folder, *command.split(), *end), run.folder)
        assert read_checkpoint(run.folder / SECOND / "checkpoints" / "last.ckpt")["global_step"] == int(step) + 1


FAILING_TASK = """
from pathlib import Path
from oa_train.tasks.induction import Induction

class Failing(Induction):
    def draw(self, random):
        if any(Path("runs").rglob("last.ckpt")):
            raise ZeroDivisionError("no words left")
        return super().draw(random)
"""


def test_a_task_that_fails_in_the_middle_is_named_and_leaves_the_checkpoint(tmp_path):
    (tmp_path / "mine.py").write_text(FAILING_TASK)
    small = ["--data.batch_size", "4", "--data.n_validation", "8", "--data.n_test", "8", "--data.n_means", "32"]
    words = ["fit", "--model", "CircuitModule", "--data", "mine.Failing", *small, "--checkpoint_every", "1"]
    run = Forked(tmp_path, words, os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"})
    assert run.wait(timeout=SECONDS) == 1
    said = (tmp_path / "said.txt").read_text()
    folder = Path("runs", "circuit", "version_0")
    assert_is_explained(said, "ZeroDivisionError: no words left", f"in draw ({tmp_path}/mine.py, line 8)")
    assert RunFolder(folder).resume_command() in said
    assert_is_tidy(tmp_path / "runs")
    assert (tmp_path / folder / "checkpoints" / "last.ckpt").is_file()


def test_memory_that_does_not_suffice_names_the_options_that_lower_it(fit):
    run = fit("--data.batch_size", "2000", "--model.samples_per_prompt", "64", "--data.n_means", "5000")
    log = run.folder / FIRST / "config.yaml"
    run.reach(log.is_file)
    (taken,) = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc", str(run.process.pid), "status").read_text())
    run.limit(resource.RLIMIT_AS, int(taken) * 1024 + 500_000_000)
    run.fails(
        "Out of memory",
        *("--data.batch_size", "--model.samples_per_prompt", "--model.recompute", "--lm.dtype"),
        "oa-train inspect",
        f"This starts again:\n  oa-train fit --config {FIRST}/config.yaml",
    )


INSPECT = f"{sys.executable} -m oa_train.cli.main inspect"


@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        (f"{INSPECT} | true; exit ${{PIPESTATUS[0]}}", 141, ""),
        pytest.param(f"{INSPECT} --json | true; exit ${{PIPESTATUS[0]}}", 141, "", marks=pytest.mark.long),
        pytest.param(f"{INSPECT} >&-", 0, "", marks=pytest.mark.long),
        pytest.param(f"{INSPECT} --json >&-", 0, "", marks=pytest.mark.long),
        pytest.param(f"{INSPECT} >/dev/full", 1, "The disk is full", marks=pytest.mark.long),
        pytest.param(f"{INSPECT} --lm.nam x 2>&-", 2, "", marks=pytest.mark.long),
    ],
)
def test_output_that_nobody_takes_is_no_traceback(tmp_path, line, status, error):
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == status, done.stderr
    assert error in done.stderr
    assert bool(error) == bool(done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# Writes one checkpoint after the other; each process that it starts does so until it is killed.
SAVING = """
import os, sys
import torch
from oa_train.training.checkpoints import WholeFileCheckpointIO
from tests.training.test_checkpoints import CONTENT

torch.set_num_threads(1)
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        step = 0
        while True:
            step += 1
            content = CONTENT | {"state_dict": {"a": torch.full((500_000,), step)}, "global_step": step}
            WholeFileCheckpointIO().save_checkpoint(content, "last.ckpt")
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_while_it_writes_a_checkpoint_the_file_always_loads(tmp_path, kills):
    with subprocess.Popen(
        [sys.executable, "-c", SAVING],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as saving:
        assert saving.stdin is not None
        assert saving.stdout is not None
        for kill in range(kills):
            print("again", file=saving.stdin, flush=True)
            child = int(saving.stdout.readline())
            time.sleep(0.2 + 0.0037 * kill)
            os.kill(child, signal.SIGKILL)
            assert saving.stdout.readline() == "ended\n"
            checkpoint = read_checkpoint(tmp_path / "last.ckpt")
            assert checkpoint["global_step"] > 0
            assert (checkpoint["state_dict"]["a"] == checkpoint["global_step"]).all()
        saving.stdin.close()
        assert saving.wait(timeout=SECONDS) == 0
