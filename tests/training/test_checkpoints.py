"""Checkpoint files: whole or not at all, and nothing that is not a checkpoint is taken for one."""

import pickle
from pathlib import Path

import lightning
import pytest
import torch

from oa_train.errors import CheckpointError, RunError
from oa_train.training.checkpoints import WholeFileCheckpointIO, check_identity, read_checkpoint

COUNTS = {"ready": 3, "completed": 3}
PROGRESS = {"total": COUNTS, "current": COUNTS}
BATCHES = PROGRESS | {"is_last_batch": False}
CONTENT = {
    "oa_train": {"identity": {}, "settings": {}},
    "state_dict": {"a": torch.arange(5.0)},
    "pytorch-lightning_version": lightning.__version__,
    "epoch": 0,
    "global_step": 3,
    "loops": {
        "fit_loop": {
            "state_dict": {},
            "epoch_progress": PROGRESS,
            "epoch_loop.state_dict": {"_batches_that_stepped": 3},
            "epoch_loop.batch_progress": BATCHES,
            "epoch_loop.scheduler_progress": PROGRESS,
            "epoch_loop.automatic_optimization.optim_progress": {
                "optimizer": {"step": PROGRESS, "zero_grad": PROGRESS}
            },
            "epoch_loop.manual_optimization.optim_step_progress": PROGRESS,
            "epoch_loop.val_loop.batch_progress": BATCHES,
        }
    },
    "callbacks": {},
    "optimizer_states": [],
    "lr_schedulers": [],
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "last.ckpt"
    WholeFileCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def test_round_trip(written):
    assert torch.equal(read_checkpoint(written)["state_dict"]["a"], torch.arange(5.0))
    assert [path.name for path in written.parent.iterdir()] == ["last.ckpt"]


def test_truncated_files_are_refused(written):
    content = written.read_bytes()
    for length in (0, 1, 10, len(content) // 2, len(content) - 1):
        written.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated, damaged, or no checkpoint"):
            read_checkpoint(written)


class Payload:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_file_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    for number, save in enumerate((lambda o, p: torch.save(o, p), lambda o, p: p.write_bytes(pickle.dumps(o)))):
        path = tmp_path / f"{number}.ckpt"
        save({"oa_train": Payload(marker), "state_dict": {}}, path)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        assert not marker.exists()


def test_other_files_are_refused_and_neighbours_are_named(written):
    other = written.with_name("other.ckpt")
    torch.save({"weights": torch.zeros(2)}, other)
    with pytest.raises(CheckpointError, match="is no checkpoint of oa_train"):
        read_checkpoint(other)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint at .*In .*: last\.ckpt, other"):
        read_checkpoint(written.with_name("best.ckpt"))


def test_a_write_that_fails_leaves_the_checkpoint_before(written, monkeypatch):
    before = written.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"No space left on device"):
        WholeFileCheckpointIO().save_checkpoint(CONTENT | {"global_step": 4}, written)
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == ["last.ckpt"]


def test_differences_are_listed_one_by_one():
    given = {"model": {"fingerprint": "a"}, "task": {"name": "ioi", "order": "ABBA"}, "positions": 1}
    expected = {"model": {"fingerprint": "b"}, "task": {"name": "ioi", "order": "mixed"}, "positions": 1}
    with pytest.raises(CheckpointError) as caught:
        check_identity(given, expected)
    assert "model.fingerprint: the checkpoint has a, this configuration b" in str(caught.value)
    assert "task.order: the checkpoint has ABBA, this configuration mixed" in str(caught.value)
    assert "task.name" not in str(caught.value)
    check_identity(given, given)
