"""Real processes on this machine: several do what one does with batches as large as theirs together."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


def gradients(file: Path, n_processes: int, batch_size: int, distribution: str) -> dict[str, Any]:
    words = [str(file), str(n_processes), str(batch_size), distribution]
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
    for name in ("val/kl", "val/accuracy", "val/logit_difference", "val/size", "val/objective"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4), name
