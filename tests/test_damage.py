"""Damaged files: whatever is cut, flipped or planted, the project's own error or the same content, and no code run."""

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oa_train.circuits.circuit import Circuit
from oa_train.errors import OaTrainError
from oa_train.models.families import Dimensions
from oa_train.models.selection import Nodes
from oa_train.training.callbacks import LastCheckpoint
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, small_ioi

QUICK, LONG = range(40), range(40, 560)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an artefact as a training leaves them."""
    folder = tmp_path_factory.mktemp("originals")
    trainer = quiet_trainer(
        max_steps=2,
        enable_checkpointing=True,
        plugins=[WholeFileCheckpointIO()],
        callbacks=[LastCheckpoint(folder, every_n_steps=2)],
    )
    module = CircuitModule()
    trainer.fit(module, TaskData(small_ioi()))
    provenance = {"model": "tiny", "seed": 3, "task": {"name": "ioi"}}
    scores = torch.linspace(0, 1, 15)
    Circuit(Nodes(Dimensions(3, 4, 16, 64, 256)), ("a0.h0", "m1"), scores, provenance).save(folder / "circuit")
    return folder


class Planted:
    """Unpickled carelessly, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self._trace}",)


def damage(chance: random.Random, content: bytes) -> bytes:
    """Cut a file, flip some of its bits, fill a stretch of it, or put something else in its place."""
    kind = chance.choice(["cut", "flip", "flip", "flip", "stretch", "noise"])
    if kind == "cut":
        return content[: chance.randrange(len(content))]
    if kind == "noise":
        return chance.randbytes(chance.randrange(5000))
    changed = bytearray(content)
    if kind == "stretch":
        start = chance.randrange(len(content))
        length = chance.randrange(1, 200)
        changed[start : start + length] = chance.randbytes(len(content[start : start + length]))
    else:
        for _ in range(chance.choice([1, 1, 2, 10])):
            changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(equal(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def check(read: Callable[[], Any], whole: Any) -> None:
    try:
        content = read()
    except OaTrainError:
        return
    assert equal(content, whole)


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_a_damaged_file_is_refused_or_read_as_it_was(originals, tmp_path, case):
    chance = random.Random(case)
    if case % 2:
        damaged = tmp_path / "last.ckpt"
        damaged.write_bytes(damage(chance, (originals / "last.ckpt").read_bytes()))
        check(lambda: read_checkpoint(damaged), read_checkpoint(originals / "last.ckpt"))
        return
    (tmp_path / "circuit").mkdir()
    for name in ("artefact.json", "tensors.safetensors"):
        (tmp_path / "circuit" / name).write_bytes((originals / "circuit" / name).read_bytes())
    file = tmp_path / "circuit" / chance.choice(["artefact.json", "tensors.safetensors"])
    file.write_bytes(damage(chance, file.read_bytes()))

    def content(folder: Path) -> dict[str, Any]:
        circuit = Circuit.load(folder)
        return {"nodes": circuit.nodes, "scores": circuit.scores, "provenance": dict(circuit.provenance)}

    check(lambda: content(tmp_path / "circuit"), content(originals / "circuit"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path, zipped):
    trace, path = tmp_path / "trace", tmp_path / "last.ckpt"
    if zipped:
        torch.save({"state_dict": {}, "oa_train": Planted(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": {}, "oa_train": Planted(trace)}))
    with pytest.raises(OaTrainError, match="truncated, damaged, or no checkpoint"):
        read_checkpoint(path)
    assert not trace.exists()
