"""Circuits and constants of the first layout, written by hand here, become today's."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from oa_train.ablations.constants import Constants, Slots
from oa_train.ablations.context import ablated
from oa_train.artefacts import ARTEFACT_VERSION
from oa_train.circuits.circuit import Circuit
from oa_train.cli.main import main
from oa_train.errors import ArtefactError
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec
from oa_train.models.weights import fingerprint
from tests.builders import small_ioi

NODES = ("a0.h0", "m0", "a1.h2", "a2.h1")
EDGES = ("input->a0.h0<v>", "a0.h0->m1", "input->m1", "m1->logits", "input->logits")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def batch():
    return small_ioi().batch("test", 0, 6)


def first_layout(folder: str, kind: str, header: dict, tensors: dict[str, torch.Tensor], version: int = 1) -> Path:
    """A folder as the first versions wrote it."""
    blob = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    text = json.dumps(header, sort_keys=True)
    document = {
        "kind": kind,
        "schema_version": version,
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {"oa_train": "0.1.0"},
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        "header_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "header": header,
    }
    Path(folder).mkdir()
    Path(folder, "tensors.safetensors").write_bytes(blob)
    Path(folder, "artefact.json").write_text(json.dumps(document))
    return Path(folder)


def provenance(model) -> dict:
    return {
        "model": "tiny",
        "revision": None,
        "family": "gpt2",
        "fingerprint": fingerprint(model),
        "task": {"name": "ioi", "seed": 0},
        "seed": 0,
        "ablation": "optimal",
    }


def old_circuit(model, of_edges: bool) -> Path:
    names = {"edges": list(EDGES)} if of_edges else {"nodes": list(NODES)}
    more = {"n_kv_heads": 4, "parallel": False} if of_edges else {}
    level = Graph.of(model.config) if of_edges else Nodes.of(model.config)
    mask = level.mask(EDGES if of_edges else NODES)
    header = {**names, "n_layers": 3, "n_heads": 4, **more, "provenance": provenance(model)}
    return first_layout("old_circuit", "circuit", header, {"mask": mask, "scores": mask.float() / 2})


def old_tables(n_positions: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(n_positions)
    shapes = {"inputs": (1, n_positions, 64), "heads": (3, n_positions, 4, 16), "mlps": (3, n_positions, 64)}
    return {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}


def old_constants(model, n_positions: int, bos: int | None) -> Path:
    header = {"bos_token_id": bos, "provenance": provenance(model)}
    return first_layout("old_constants", "constants", header, old_tables(n_positions))


def built_directly(model, n_positions: int, bos: int | None) -> Constants:
    old = old_tables(n_positions)
    tables = {Site("embedding"): old["inputs"].transpose(0, 1)}
    for layer in range(3):
        tables[Site("heads", layer)] = old["heads"][layer]
        tables[Site("mlp", layer)] = old["mlps"][layer][:, None]
    return Constants(tables, Slots(n_positions), provenance(model) | {"bos_token_id": bos})


@pytest.mark.parametrize("protects", [True, False], ids=["with bos", "without"])
@pytest.mark.parametrize("n_positions", [1, 5], ids=["pooled", "by position"])
@pytest.mark.parametrize("of_edges", [False, True], ids=["nodes", "edges"])
def test_a_converted_circuit_and_its_constants_give_the_logits_of_those_built_directly(
    model, batch, capsys, of_edges, n_positions, protects
):
    bos = model.config.bos_token_id if protects else None
    folders = old_circuit(model, of_edges), old_constants(model, n_positions, bos)
    before = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    for folder in folders:
        assert main(["convert", str(folder), f"new/{folder.name}"]) == 0
        assert f"converted: new/{folder.name}" in capsys.readouterr().out
    assert before == [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    circuit, constants = Circuit.load("new/old_circuit"), Constants.load("new/old_constants")
    level = Graph.of(model.config) if of_edges else Nodes.of(model.config)
    assert circuit == Circuit(level, EDGES if of_edges else NODES)
    assert circuit.provenance == provenance(model)
    assert torch.equal(circuit.scores, circuit.mask.float() / 2)
    expected = built_directly(model, n_positions, bos)
    assert constants.provenance == expected.provenance
    constants.check_fits(level)
    call = {"input_ids": batch.tokens, "attention_mask": batch.attention_mask.long()}
    with torch.no_grad():
        with ablated(model, Circuit(level, circuit.names), expected):
            wanted = model(**call).logits
        with ablated(model, circuit, constants):
            assert torch.equal(model(**call).logits, wanted)
        assert (model(**call).logits - wanted).abs().max() > 0.1


def test_loading_the_first_layout_names_the_command(model):
    old_circuit(model, False)
    old_constants(model, 1, None)
    for kind, folder in ((Circuit, "old_circuit"), (Constants, "old_constants")):
        with pytest.raises(
            ArtefactError, match=rf"layout 1; this version reads 2.*\n  oa-train convert {folder} NEW_"
        ):
            kind.load(folder)


def complaint(capsys, *words: str) -> str:
    assert main(["convert", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("oa-train: error: ")
    assert "Traceback" not in said
    return said


def test_nothing_is_overwritten(model, capsys):
    old_circuit(model, False)
    Path("new").mkdir()
    assert "new exists already and results are never overwritten" in complaint(capsys, "old_circuit", "new")
    assert not list(Path("new").iterdir())


def test_todays_layout_needs_no_conversion(model, capsys):
    level = Nodes.of(model.config)
    Circuit(level, NODES).save("circuit")
    Constants.zeros(level).save("constants")
    for folder in ("circuit", "constants"):
        said = complaint(capsys, folder, "new")
        assert f"{folder} is of the current layout already ({ARTEFACT_VERSION}); it needs no conversion." in said
    assert not Path("new").exists()


def test_what_is_no_such_folder_is_refused(model, capsys):
    assert "There is no circuit and no constants at nowhere" in complaint(capsys, "nowhere", "new")
    Path("empty").mkdir()
    assert "There is no circuit and no constants at empty" in complaint(capsys, "empty", "new")
    first_layout("other", "lens", {}, {"mask": torch.zeros(1)})
    assert "other holds 'lens'; expected 'circuit'" in complaint(capsys, "other", "new")
    Path("run/circuit").mkdir(parents=True)
    Path("run/circuit/artefact.json").write_text("{}")
    assert "run is the folder of a run. Convert the folders in it, each by itself: run/circuit." in complaint(
        capsys, "run", "new"
    )
    first_layout("newer", "circuit", {}, {"mask": torch.zeros(1)}, version=7)
    assert "newer has schema version 7" in complaint(capsys, "newer", "new")
    damaged = old_constants(model, 1, None)
    (damaged / "tensors.safetensors").write_bytes(b"cut off")
    assert "is damaged" in complaint(capsys, str(damaged), "new")
    header = {"nodes": list(NODES), "n_layers": 3, "n_heads": 4, "provenance": {}}
    first_layout("nameless", "circuit", header, {"mask": torch.zeros(15).bool()})
    said = complaint(capsys, "nameless", "new")
    assert "nameless does not name its model, whose sizes the current layout needs" in said
    assert "Circuit(Nodes.of(model.config), names).save(" in said
    assert not Path("new").exists()
