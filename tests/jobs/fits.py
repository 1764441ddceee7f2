"""Fits in processes of their own, as a user starts them, and what has to be the same when they were interrupted.

python -m tests.jobs.fits fit ...

is `oa-train fit ...`, and every process of it leaves its id and its exit status in the folder `processes`. The first
one ends so many seconds later as the variable LINGER says.

Programs are forked from a server that has done the imports, because these take longer than a small fit.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
import yaml
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

from oa_train.training.checkpoints import read_checkpoint

ROOT = Path(__file__).parent.parent.parent

SMALL = [
    *("--config", str(ROOT / "configs" / "circuit_nodes_tiny.yaml")),
    *("--data.batch_size", "4", "--data.batches_per_epoch", "20", "--trainer.max_epochs", "3"),
    *("--data.n_validation", "32", "--data.n_means", "32", "--data.n_test", "32"),
    *("--finish.refit.steps", "4", "--trainer.enable_progress_bar", "false", "--checkpoint_every", "1"),
]

# Where `SMALL` puts its first run, and what a resume of that makes.
FIRST, SECOND = (Path("runs", "circuit_nodes_tiny", f"version_{number}") for number in range(2))

SEVERAL = ("--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices")

SECONDS = 120.0

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["oa_train.cli.fit", "oa_train.studies.compare", "tests.jobs.gradients"])


class Process(Protocol):
    """A process as `subprocess` has it."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


class Forked:
    """A module of this folder that runs as a program, forked from the server, in a session of its own.

    Processes that Lightning starts for the other ranks are fresh ones.
    """

    def __init__(
        self, folder: Path, words: Sequence[str], environment: Mapping[str, str], module: str = "tests.jobs.fits"
    ) -> None:
        program = (module, folder, [*words], dict(environment))
        # A daemon, so that one that a failed test has left behind is ended with the tests.
        self._process = SERVER.Process(target=_forked, args=program, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("oa-train", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


def start(
    folder: Path,
    *more: str,
    n_processes: int = 1,
    launcher: Sequence[str] = ("-m",),
    environment: Mapping[str, str] | None = None,
) -> Process:
    """Start a small fit in a folder; what it says is added to `said.txt` there."""
    several = [*SEVERAL, str(n_processes)] if n_processes > 1 else []
    words = ["fit", *SMALL, *several, *more]
    variables = os.environ | dict(environment or {})
    if [*launcher] == ["-m"]:
        return Forked(folder, words, variables)
    command = [sys.executable, *launcher, "tests.jobs.fits", *words]
    with (folder / "said.txt").open("ab") as said:
        # In a session of its own, so that all processes of a run can be killed at once.
        return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, start_new_session=True, env=variables)


def done(folder: Path, *words: str) -> str:
    """Run `oa-train` with these words in a folder to its good end, and return what it said."""
    said = folder / "said.txt"
    before = len(said.read_text()) if said.exists() else 0
    return finished(Forked(folder, words, os.environ), folder, 5 * SECONDS)[before:]


def torchrun(n_processes: int) -> list[str]:
    """Words that have torchrun start the module named after them."""
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(n_processes), "--master_port", free_port(), "-m"]


def free_port() -> str:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def wait_until(reached: Callable[[], bool], process: Process, folder: Path) -> None:
    """Wait while a fit runs, for as long as it may take."""
    end = time.monotonic() + SECONDS
    while not reached():
        assert process.poll() is None, (folder / "said.txt").read_text()
        assert time.monotonic() < end, (folder / "said.txt").read_text()
        time.sleep(0.01)


def finished(process: Process, folder: Path, seconds: float = SECONDS) -> str:
    """Wait for the good end of a command, and return what it said."""
    said = folder / "said.txt"
    assert process.wait(timeout=seconds) == 0, said.read_text()
    return said.read_text()


def statuses(folder: Path) -> dict[int, int]:
    """Exit status of every process, by its rank."""
    return {int(path.stem): int(path.read_text()) for path in (folder / "processes").glob("*.status")}


def process_id(folder: Path, rank: int) -> int:
    """Id of a process."""
    return int((folder / "processes" / f"{rank}.pid").read_text())


def assert_ended_alike(resumed: Path, uninterrupted: Path, last: Path) -> None:
    """Check that a run which went on from a checkpoint has ended as another did, to the last bit."""
    ended, expected = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (resumed, uninterrupted))
    assert ended["global_step"] == expected["global_step"] == 60
    assert ended["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(ended["state_dict"][name], tensor), name
    for artefact in ("circuit", "constants"):
        contents = [(run / artefact / "tensors.safetensors").read_bytes() for run in (resumed, uninterrupted)]
        assert contents[0] == contents[1], artefact
    assert yaml.safe_load((resumed / "config.yaml").read_text())["resumed_from"] == str(last)


def _rank() -> str:
    return next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")


def _leave(what: str, content: int) -> None:
    path = Path("processes", f"{_rank()}.{what}")
    path.parent.mkdir(exist_ok=True)
    path.write_text(str(content))


def command() -> None:
    """Run `oa-train` with the words of the command line."""
    from oa_train.cli.main import main

    _leave("pid", os.getpid())
    status = main()
    if _rank() == "0":
        time.sleep(float(os.environ.get("LINGER", "0")))
    _leave("status", status)
    sys.exit(status)


def _forked(module: str, folder: Path, words: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.close(said)
    # As Lightning sets it when it is imported, which the server has done in its own environment.
    rank_zero_only.rank = _get_rank() or 0
    # As `python -m` leaves them; Lightning reads from them how to start the other ranks.
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    sys.argv = [module, *words]
    sys.modules["__main__"].__spec__ = find_spec(module)
    import_module(module).command()


if __name__ == "__main__":
    command()
