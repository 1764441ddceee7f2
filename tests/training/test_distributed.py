"""Real processes on this machine: several do what one does with batches as large as theirs together."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oa_train.training.checkpoints import read_checkpoint

ROOT = Path(__file__).parent.parent.parent
PATHS = {"PYTHONPATH": str(ROOT)}


def gradients(file: Path, n_processes: int, batch_size: int, distribution: str, *more: str) -> dict[str, Any]:
    words = [str(file), str(n_processes), str(batch_size), distribution, *more]
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.gradients", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("distribution", ["uniform", "hard_concrete"])
def test_two_processes_have_the_gradient_of_one_with_twice_the_batch(tmp_path, distribution):
    one = gradients(tmp_path / "one", 1, 8, distribution)
    two = gradients(tmp_path / "two", 2, 4, distribution)
    assert len(one["gradients"]) == len(two["gradients"]) == 2
    for alone, shared in zip(one["gradients"], two["gradients"], strict=True):
        for name, gradient in alone.items():
            assert gradient.abs().max() > 1e-6, name
            torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-7)
    # Seven prompts in two shares: the mean is over prompts and not over processes.
    for name in (
        "train/loss",
        "train/kl",
        "val/kl",
        "val/accuracy",
        "val/logit_difference",
        "val/size",
        "val/objective",
    ):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4), name


@pytest.mark.parametrize("more", [("fsdp",), ("fsdp", "recompute")], ids=" ".join)
def test_a_model_that_is_shared_out_gives_the_gradients_of_one_that_is_not(tmp_path, more):
    whole = gradients(tmp_path / "whole", 2, 4, "hard_concrete", "ddp")
    shared = gradients(tmp_path / "shared", 2, 4, "hard_concrete", *more)
    for expected, given in zip(whole["gradients"], shared["gradients"], strict=True):
        for name, gradient in expected.items():
            assert torch.equal(given[name], gradient), name
    assert whole["metrics"] == shared["metrics"]


LAUNCHED = {
    "by Lightning": ["-m", "oa_train.cli.main"],
    "by torchrun": [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29611",
        "-m",
        "oa_train.cli.main",
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_a_run_in_two_processes_writes_its_files_once(tmp_path, launcher):
    options = "--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp --trainer.max_steps 3"
    options += " --data.batch_size 2 --data.batches_per_epoch 3 --data.n_validation 8 --data.n_test 8 --data.n_means 8"
    options += " --finish.refit.steps 2 --trainer.default_root_dir runs --experiment shared --checkpoint_every 1"
    config = ROOT / "configs" / "circuit_nodes_tiny.yaml"
    words = [*LAUNCHED[launcher], "fit", "--config", str(config), *options.split()]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ | PATHS
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "shared").iterdir()
    assert run.name == "version_0"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert [path.name for path in (run / "studies").iterdir()] == ["fit_0"]
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3
    steps = [line for line in (run / "metrics.csv").read_text().splitlines() if line][1:]
    assert len(steps) <= 4
