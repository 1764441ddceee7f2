"""Result folders are whole, never overwritten, and refused when anything in them is damaged."""

import json
import math
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from oa_train.artefacts import ARTEFACT_VERSION, HEADER_FILE, TENSOR_FILE, Artefact, load_artefact, save_artefact
from oa_train.errors import ArtefactError, RunError
from oa_train.files import replace_file, write_json


def example() -> Artefact:
    numbers = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    tensors = {
        "numbers": numbers.double() / 3,
        "transposed": numbers.t(),
        "row": numbers[1],
        "half": numbers.bfloat16(),
        "odd": torch.tensor([math.nan, -math.inf, -0.0, 5e-324], dtype=torch.float64),
        "mask": numbers > 0,
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
    }
    return Artefact({"name": "Grüße", "list": [1, 2.5, None, True], "inner": {"a": 0.1}}, tensors)


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_round_trip_is_the_identity(tmp_path):
    saved = example()
    folder = tmp_path / "deep" / "result"
    assert save_artefact(folder, "test", saved) == folder
    loaded = load_artefact(folder, "test")
    assert loaded.header == saved.header
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert loaded.tensors[name].shape == tensor.shape
        assert bits(loaded.tensors[name]) == bits(tensor)
    assert names_in(folder) == [HEADER_FILE, TENSOR_FILE]
    assert names_in(folder.parent) == ["result"]


def test_the_header_names_kind_versions_and_time(tmp_path):
    document = json.loads((save_artefact(tmp_path / "r", "test", example()) / HEADER_FILE).read_text())
    assert document["kind"] == "test"
    assert document["schema_version"] == ARTEFACT_VERSION == 2
    assert document["versions"]["torch"] == version("torch")
    assert document["created"].endswith("+00:00")


def test_gradients_are_left_behind(tmp_path):
    tensor = torch.ones(2, requires_grad=True)
    save_artefact(tmp_path / "r", "test", Artefact({}, {"t": tensor * 2}))
    assert not load_artefact(tmp_path / "r", "test").tensors["t"].requires_grad


@pytest.mark.parametrize("there", ["artefact", "empty folder", "file"])
def test_nothing_is_ever_overwritten(tmp_path, there):
    folder = tmp_path / "r"
    if there == "artefact":
        save_artefact(folder, "test", example())
    elif there == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
    before = names_in(folder) if folder.is_dir() else folder.read_text()
    with pytest.raises(ArtefactError, match=f"{re.escape(str(folder))} exists already"):
        save_artefact(folder, "test", Artefact({}, {}))
    assert before == (names_in(folder) if folder.is_dir() else folder.read_text())
    assert names_in(tmp_path) == ["r"]


@pytest.mark.parametrize(
    "artefact",
    [
        Artefact({}, {"sparse": torch.eye(3).to_sparse()}),
        Artefact({"not plain": object()}, {"t": torch.ones(2)}),
        Artefact({}, {"t": torch.ones(2, device="meta")}),
    ],
    ids=["sparse tensor", "header that is no JSON", "tensor without values"],
)
def test_what_cannot_be_saved_leaves_nothing(tmp_path, artefact):
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
        save_artefact(tmp_path / "r", "test", artefact)
    assert names_in(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    folder = tmp_path / "file" / "r"
    with pytest.raises(RunError, match=f"{re.escape(str(folder))} cannot be written"):
        save_artefact(folder, "test", example())
    assert names_in(tmp_path) == ["file"]


def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        save_artefact(tmp_path / "r", "test", example())
    assert names_in(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_artefact(tmp_path / "r", "test", example())
    assert names_in(tmp_path) == []


def refused(folder: Path, kind: str = "test") -> str:
    with pytest.raises(ArtefactError) as caught:
        load_artefact(folder, kind)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("file", [TENSOR_FILE, HEADER_FILE])
def test_a_truncated_file_is_refused(tmp_path, file, share):
    path = save_artefact(tmp_path / "r", "test", example()) / file
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert file in refused(tmp_path / "r")


def test_any_flipped_byte_of_the_tensors_is_refused(tmp_path):
    path = save_artefact(tmp_path / "r", "test", example()) / TENSOR_FILE
    content = path.read_bytes()
    for place in (0, 9, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert "checksum" in refused(tmp_path / "r")
    path.write_bytes(content + b"\0")
    assert "checksum" in refused(tmp_path / "r")
    path.write_bytes(content)
    load_artefact(tmp_path / "r", "test")


def without(key: str) -> Callable[[dict], object]:
    return lambda document: {name: value for name, value in document.items() if name != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d | {"kind": "constants"}, "holds 'constants'; expected 'test'"),
        (without("kind"), "holds None; expected 'test'"),
        (lambda d: [d], "holds 'list'; expected 'test'"),
        (lambda d: d | {"schema_version": 3}, "schema version 3; expected 2. Was it written by a newer oa_train?"),
        (lambda d: d | {"schema_version": 0}, "schema version 0; expected 2"),
        (lambda d: d | {"schema_version": "1"}, "schema version '1'; expected 2"),
        (without("schema_version"), "schema version None"),
        (without("tensors_sha256"), "tensors_sha256"),
        (without("header"), "header"),
    ],
)
def test_another_header_is_refused(tmp_path, change, words):
    path = save_artefact(tmp_path / "r", "test", example()) / HEADER_FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert words in refused(tmp_path / "r")


def test_the_first_layout_is_refused_with_the_command_that_converts_it(tmp_path):
    path = save_artefact(tmp_path / "old", "test", example()) / HEADER_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    said = refused(tmp_path / "old")
    assert "written by an earlier version of oa_train (layout 1; this version reads 2)" in said
    assert said.endswith(f"Convert it:\n  oa-train convert {tmp_path / 'old'} NEW_FOLDER")
    assert load_artefact(tmp_path / "old", "test", layout=1).header == example().header


def test_a_header_that_is_no_text_is_refused(tmp_path):
    (save_artefact(tmp_path / "r", "test", example()) / HEADER_FILE).write_bytes(b"\xff\xfe\x00{")
    assert HEADER_FILE in refused(tmp_path / "r")


def test_missing_files_are_refused(tmp_path):
    assert "There is no test at" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert HEADER_FILE in refused(tmp_path / "empty")
    (save_artefact(tmp_path / "r", "test", example()) / TENSOR_FILE).unlink()
    assert TENSOR_FILE in refused(tmp_path / "r")


def test_tensors_that_were_never_safetensors_are_refused(tmp_path):
    folder = save_artefact(tmp_path / "r", "test", example())
    document = json.loads((folder / HEADER_FILE).read_text())
    (folder / TENSOR_FILE).write_bytes(b"")
    document["tensors_sha256"] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (folder / HEADER_FILE).write_text(json.dumps(document))
    assert "damaged" in refused(folder)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["file"]


@pytest.mark.usefixtures("unchecked")
def test_the_old_file_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    with pytest.raises(TypeError):
        replace_file(path, ["not bytes"])
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_readers_never_see_a_part(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")
    seen = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(path.read_bytes()), sync(handle)))
    replace_file(path, b"new")
    assert seen[0] == b"old"
    assert set(seen) <= {b"old", b"new"}


def test_json_is_written_whole_and_without_nan(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": [1, 0.1, None]})
    assert json.loads(path.read_text()) == {"x": [1, 0.1, None]}
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, {"x": value})
    assert json.loads(path.read_text()) == {"x": [1, 0.1, None]}
    assert names_in(path.parent) == ["b.json"]
