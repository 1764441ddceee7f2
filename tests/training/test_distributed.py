"""Real processes on this machine: several do what one does with batches as large as theirs together."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from oa_train.models.dictionaries import save_dictionary
from oa_train.training.checkpoints import read_checkpoint
from tests.builders import random_dictionary
from tests.jobs.fits import FIRST, SECOND, Forked, Process, finished, free_port, start, torchrun

CIRCUITS = ("uniform", "hard_concrete", "spans", "features")
OTHERS = ("lens", "tracing", "constants")
SHARED_OUT = ("hard_concrete:fsdp", "hard_concrete:fsdp:recompute")


def gradients(file: Path, n_processes: int, batch_size: int, *cases: str) -> dict[str, Any]:
    save_dictionary(random_dictionary("r2", 24, d_model=64), file.parent / "dictionary")
    words = [str(file), str(n_processes), str(batch_size), *cases]
    finished(Forked(file.parent, words, os.environ, "tests.jobs.gradients"), file.parent, 300)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Gradients and metrics of two processes."""
    return gradients(tmp_path_factory.mktemp("two") / "file", 2, 4, *CIRCUITS, *OTHERS, *SHARED_OUT, "constants:fsdp")


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Gradients and metrics of one process with twice the batch."""
    return gradients(tmp_path_factory.mktemp("one") / "file", 1, 8, *CIRCUITS, *OTHERS)


@pytest.mark.parametrize("trained", OTHERS)
def test_two_processes_train_lenses_and_tracing_constants_as_one_does(trained, by_one, by_two):
    alone, shared = by_one[trained], by_two[trained]
    for expected, of_two in zip(alone["gradients"], shared["gradients"], strict=True):
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-6, name
            torch.testing.assert_close(of_two[name], gradient, rtol=1e-4, atol=1e-7)
    assert alone["metrics"].keys() == shared["metrics"].keys()
    for name in alone["metrics"]:
        if name.startswith("val/"):
            assert shared["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-4), name


def test_constants_alone_train_with_a_sharded_model_as_with_a_whole_one(by_two):
    whole, shared = (by_two[case]["gradients"] for case in ("constants", "constants:fsdp"))
    for expected, of_shared in zip(whole, shared, strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(of_shared[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("circuit", CIRCUITS)
def test_two_processes_have_the_gradient_of_one_with_twice_the_batch(circuit, by_one, by_two):
    alone, shared = by_one[circuit], by_two[circuit]
    assert len(alone["gradients"]) == len(shared["gradients"]) == 2
    for expected, of_two in zip(alone["gradients"], shared["gradients"], strict=True):
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-6, name
            torch.testing.assert_close(of_two[name], gradient, rtol=1e-4, atol=1e-7)
    # Seven prompts in two shares: the mean is over prompts and not over processes.
    evaluated = ("kl", "accuracy", "logit_difference", "size", "objective")
    for name in ("train/loss", "train/kl", *(f"val/{figure}" for figure in evaluated)):
        assert shared["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-4), name


@pytest.mark.parametrize("case", SHARED_OUT)
def test_a_model_that_is_shared_out_gives_the_gradients_of_one_that_is_not(case, by_two):
    whole, shared = by_two["hard_concrete"], by_two[case]
    for expected, of_shared in zip(whole["gradients"], shared["gradients"], strict=True):
        for name, gradient in expected.items():
            assert torch.equal(of_shared[name], gradient), name
    assert whole["metrics"] == shared["metrics"]


FEW = [
    *("--trainer.max_steps", "3", "--data.batch_size", "2", "--data.batches_per_epoch", "3"),
    *("--data.n_validation", "8", "--data.n_test", "8", "--data.n_means", "8"),
    *("--finish.refit.steps", "2", "--checkpoint_every", "1"),
]


def launch(folder: Path, way: str, *more: str) -> list[Process]:
    """Start a short run of two processes."""
    if way != "two nodes":
        launcher = torchrun(2) if way == "torchrun" else ["-m"]
        return [start(folder, *FEW, *more, n_processes=2, launcher=launcher)]
    port, options = (
        free_port(),
        ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.num_nodes", "2"],
    )
    node = ["-m", "torch.distributed.run", "--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    launchers = [[*node, "--node_rank", str(rank), "--nproc_per_node", "1", "-m"] for rank in range(2)]
    return [start(folder, *FEW, *options, *more, launcher=launcher) for launcher in launchers]


@pytest.fixture(scope="module")
def by_lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of two processes that Lightning has started."""
    folder = tmp_path_factory.mktemp("lightning")
    for process in launch(folder, "lightning"):
        finished(process, folder)
    return folder / FIRST


def written_once(run: Path) -> None:
    """Check that two processes have made one run."""
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert [path.name for path in (run / "studies").iterdir()] == ["fit_0"]
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3
    steps = [line for line in (run / "metrics.csv").read_text().splitlines() if line][1:]
    assert len(steps) <= 4


def test_two_processes_write_their_files_once(by_lightning):
    written_once(by_lightning)


# FSDP computes the same, and the first process writes; the others are needed for the refit.
WAYS = {"torchrun": (), "two nodes": (), "fsdp": ("--trainer.strategy", "fsdp")}


@pytest.mark.parametrize(
    "way", [*[pytest.param(way, marks=pytest.mark.long) for way in WAYS if way != "fsdp"], "fsdp"]
)
def test_whoever_starts_two_processes_and_shares_them_out_they_end_alike(tmp_path, way, by_lightning):
    for process in launch(tmp_path, way, *WAYS[way]):
        finished(process, tmp_path)
    run = tmp_path / FIRST
    written_once(run)
    runs = (run, by_lightning)
    ended, expected = (read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in runs)
    for name, tensor in expected.items():
        assert torch.equal(ended[name], tensor), name
    for artefact in ("circuit", "constants"):
        contents = [(folder / artefact / "tensors.safetensors").read_bytes() for folder in runs]
        assert contents[0] == contents[1], artefact


@pytest.mark.parametrize(("before", "after"), [("fsdp", "ddp"), ("ddp", "fsdp")])
@pytest.mark.long
def test_a_run_is_resumed_under_another_strategy_bit_for_bit(tmp_path, before, after, by_lightning):
    for process in launch(tmp_path, before, "--trainer.strategy", before, "--trainer.max_steps", "2"):
        finished(process, tmp_path)
    last = str(FIRST / "checkpoints" / "last.ckpt")
    for process in launch(tmp_path, after, "--trainer.strategy", after, "--ckpt_path", last):
        finished(process, tmp_path)
    ended = read_checkpoint(tmp_path / SECOND / "checkpoints" / "last.ckpt")["state_dict"]
    expected = read_checkpoint(by_lightning / "checkpoints" / "last.ckpt")["state_dict"]
    for name, tensor in expected.items():
        assert torch.equal(ended[name], tensor), name
