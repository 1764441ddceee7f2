"""Fits in processes of their own, as a user starts them, and what has to be the same when they were interrupted.

python -m tests.jobs.fits fit ...

is `oa-train fit ...`, and every process of it leaves its id and its exit status in the folder `processes`. The first
one ends so many seconds later as the variable LINGER says.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import yaml

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


def start(
    folder: Path,
    *more: str,
    n_processes: int = 1,
    launcher: Sequence[str] = ("-m",),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a small fit in a folder; what it says is added to `said.txt` there."""
    several = [*SEVERAL, str(n_processes)] if n_processes > 1 else []
    command = [sys.executable, *launcher, "tests.jobs.fits", "fit", *SMALL, *several, *more]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {})
    with (folder / "said.txt").open("ab") as said:
        # In a session of its own, so that all processes of a run can be killed at once.
        return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, start_new_session=True, env=variables)


def torchrun(n_processes: int) -> list[str]:
    """Words that have torchrun start the module named after them."""
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(n_processes), "--master_port", free_port(), "-m"]


def free_port() -> str:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait while a fit runs, for as long as it may take."""
    end = time.monotonic() + SECONDS
    while not reached():
        assert process.poll() is None, (folder / "said.txt").read_text()
        assert time.monotonic() < end, (folder / "said.txt").read_text()
        time.sleep(0.01)


def finished(process: subprocess.Popen[bytes], folder: Path) -> str:
    """Wait for the good end of a fit, and return what it said."""
    said = folder / "said.txt"
    assert process.wait(timeout=SECONDS) == 0, said.read_text()
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


if __name__ == "__main__":
    from oa_train.cli.main import main

    _leave("pid", os.getpid())
    status = main()
    if _rank() == "0":
        time.sleep(float(os.environ.get("LINGER", "0")))
    _leave("status", status)
    sys.exit(status)
