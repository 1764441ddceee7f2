"""Damaged files: whatever is cut, flipped or planted, the project's own error or the same content, and no code run."""

import copy
import hashlib
import json
import math
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oa_train.ablations.constants import Constants
from oa_train.artefacts import ARTEFACT_VERSION, HEADER_FILE, TENSOR_FILE, load_artefact, tensor_bytes
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ArtefactError, CheckpointError, OaTrainError
from oa_train.models.graph import Graph
from oa_train.models.parts import Dimensions
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


# A JSON value that is not what is written, by the kind of mistake.
MUTATIONS: dict[str, Any] = {
    "null": None,
    "NaN": math.nan,
    "infinite": math.inf,
    "huge": 10**30,
    "negative": -1,
    "zero": 0,
    "text": "x",
    "list": [1],
    "object": {},
    "missing": ...,
    "deep": "@deep",
}
ENDLESS = 10**8


def paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    copied = parent = copy.deepcopy(content)
    for key in path[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return copied


def write(folder: Path, kind: str, header: Any, tensors: dict[str, torch.Tensor]) -> Path:
    """An artefact whose checksums are right, whatever it holds."""
    folder.mkdir()
    blob = tensor_bytes(tensors)
    document = {"kind": kind, "schema_version": ARTEFACT_VERSION, "tensors_sha256": hashlib.sha256(blob).hexdigest()}
    document |= {"header_sha256": hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()}
    text = json.dumps(document | {"header": header}).replace('"@deep"', "[" * 10**5 + "]" * 10**5)
    (folder / HEADER_FILE).write_text(text)
    (folder / TENSOR_FILE).write_bytes(blob)
    return folder


NODES = Nodes(Dimensions(2, 2, 4, 8, 16), ("heads", "mlp"))
GRAPH = Graph(2, 2, 1, False, 4, 8)
PROVENANCE = {"model": "tiny", "seed": 3, "ablation": "optimal", "bos_token_id": 1, "selected": ["*"]}
PROVENANCE |= {"revision": None, "task": {"name": "ioi"}, "training": {"positions": 1}}
ARTEFACTS: dict[str, Circuit | Constants] = {
    "nodes": Circuit(NODES, ("a0.h0", "m1"), torch.linspace(0, 1, 6), PROVENANCE),
    "edges": Circuit(GRAPH, ("input->m0", "m0->logits"), torch.linspace(0, 1, len(GRAPH)), PROVENANCE),
    "constants": replace(Constants.zeros(NODES), provenance=PROVENANCE),
}


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_changed_artefact_is_refused_or_read_as_it_is(tmp_path, name):
    original = ARTEFACTS[name]
    kind = "constants" if name == "constants" else "circuit"
    content = load_artefact(original.save(tmp_path / "original"), kind)
    cases = [(path, value) for path in paths(content.header) for value in (*MUTATIONS.values(), ENDLESS)]
    cases += [(("extra",), 1), (("provenance", "extra"), 1)]
    headers = [(changed(content.header, *case), content.tensors, case) for case in cases]
    tensors = dict(content.tensors)
    for key, tensor in content.tensors.items():
        others = [tensor[:0], tensor[:-1], tensor[None], tensor.long(), torch.full_like(tensor, math.nan)]
        headers += [(content.header, tensors | {key: other}, key) for other in others if tensor.is_floating_point()]
        headers += [
            (content.header, {"extra": tensor} | tensors, key),
            (content.header, tensors | {key: tensor[0]}, key),
        ]
    refused = 0
    for number, (header, numbers, case) in enumerate(headers):
        folder = write(tmp_path / str(number), kind, header, numbers)
        try:
            loaded = type(original).load(folder)
        except ArtefactError:
            refused += 1
            continue
        again = load_artefact(loaded.save(tmp_path / f"{number}_again"), kind)
        assert again.header == header, case
        assert equal(again.tensors, numbers), case
    assert refused > 0.6 * len(headers)


CHECKPOINTS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("lacks pytorch-lightning_version", ("pytorch-lightning_version",), ...),
    ("written with Lightning '1.9.0'", ("pytorch-lightning_version",), "1.9.0"),
    ("written with Lightning '99.0'", ("pytorch-lightning_version",), "99.0"),
    ("truncated, damaged, or no", ("pytorch-lightning_version",), "new"),
    ("global_step is -1", ("global_step",), -1),
    ("global_step is True", ("global_step",), True),
    ("epoch is 0.5", ("epoch",), 0.5),
    ("total.ready is -5", ("loops", "fit_loop", "epoch_loop.batch_progress", "total", "ready"), -5),
    ("lacks epoch_progress", ("loops", "fit_loop", "epoch_progress"), ...),
    ("lacks completed", ("loops", "fit_loop", "epoch_loop.batch_progress", "total", "completed"), ...),
    ("lacks is_last_batch", ("loops", "fit_loop", "epoch_loop.batch_progress", "is_last_batch"), ...),
    ("given is None", ("loops", "fit_loop", "state_dict", "combined_loader", 0, "given"), None),
    ("amsgrad is -1", ("optimizer_states", 0, "param_groups", 0, "amsgrad"), -1),
    ("lacks optimizer_states", ("optimizer_states",), ...),
    (
        "state_dict.masks.distribution.logits is list; expected Tensor",
        ("state_dict", "masks.distribution.logits"),
        [1],
    ),
    ("holds NaN", ("state_dict", "masks.distribution.logits"), torch.full((15,), math.nan)),
    ("without numbers", ("state_dict", "masks.distribution.logits"), torch.zeros(1).expand(10**12)),
    ("without numbers", ("state_dict", "masks.distribution.logits"), torch.zeros(15, device="meta")),
    ("state of its optimiser", ("optimizer_states", 0, "state", 0, "step"), torch.tensor(-1.0)),
    ("state of its optimiser", ("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(3, 3)),
    ("state of its optimiser", ("optimizer_states", 0, "state", 0, "exp_avg"), ...),
    ("oa_train describes the run by tensors", ("oa_train", "identity", "masks"), torch.zeros(2)),
]


@pytest.mark.parametrize(("words", "path", "value"), CHECKPOINTS)
def test_a_changed_checkpoint_is_refused(originals, tmp_path, words, path, value):
    torch.save(changed(read_checkpoint(originals / "last.ckpt"), path, value), tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_compressed_checkpoint_is_refused_before_it_is_read(originals, tmp_path):
    with (
        zipfile.ZipFile(originals / "last.ckpt") as whole,
        zipfile.ZipFile(tmp_path / "last.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in whole.infolist():
            packed.writestr(part.filename, whole.read(part))
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        read_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("opcodes", [b"cbuiltins\nset\n)(tR.", b"K\x01K\x02R.", b"R.", b"(lK\x01K\x02s.", b"K\x01a."])
def test_pickles_that_cannot_be_unpickled_are_refused(tmp_path, opcodes):
    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as archive:
        archive.writestr("last/data.pkl", b"\x80\x02" + opcodes)
        archive.writestr("last/version", "3\n")
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        read_checkpoint(tmp_path / "last.ckpt")
