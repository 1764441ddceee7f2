"""A run whose model has moved finds it by its fingerprint, in a few folders."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from oa_train.ablations.fitting import RefitSettings
from oa_train.cli.main import main
from oa_train.cli.precheck import stored_config
from oa_train.errors import ArtefactError
from oa_train.models import moved_models
from oa_train.models.loading import load_model
from oa_train.models.moved_models import places
from oa_train.models.spec import LMSpec, builtin_models
from oa_train.studies.finish_circuits import FinishSettings, finish
from oa_train.studies.run_folder import RunFolder
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, small_ioi

GONE = "/gone/model"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of the built-in model."""
    run = tmp_path_factory.mktemp("finished")
    task, module = small_ioi(n_validation=8, n_test=8, n_means=8), CircuitModule()
    quiet_trainer(max_steps=1).fit(module, datamodule=TaskData(task))
    finish(module.frozen, task, module.trained_circuits(), run, FinishSettings(refit=RefitSettings(steps=0)))
    RunFolder(run).save_config({"lm": {"name": GONE}, "data": {"class_path": "IOI", "init_args": {"n_test": 8}}})
    return run


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> RunFolder:
    """A copy of the run, deep in an otherwise empty tree that holds all places which are looked at."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("OA_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return RunFolder(shutil.copytree(finished, tmp_path / "a/b/project/runs/circuit/version_0"))


def model_at(folder: Path, *, seed: int | None = None, **config: object) -> Path:
    """A copy of the built-in model, with other weights for a seed, or another configuration alone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(builtin_models()["tiny"], folder)
    if seed is not None:
        model = load_model(LMSpec("tiny"))
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        model.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    "place",
    [
        "a/b/project/runs/circuit/model",
        "a/b/project/models/model",
        "work/model",
        "work/.cache/model",
        "cache/gguf/0123",
        "hub/models--owner--model/snapshots/0123",
    ],
)
def test_a_moved_model_is_found_and_said(run, tmp_path, place):
    folder = model_at(tmp_path / place)
    with pytest.warns(UserWarning, match=f"^The model {GONE} is not there; {folder} has the same weights and is used"):
        assert run.lm() == LMSpec(str(folder))


@pytest.mark.parametrize("place", ["a/b/model", "work/models/more/model", "model"])
def test_a_model_elsewhere_is_not_looked_for(run, tmp_path, monkeypatch, place):
    model_at(tmp_path / place)
    read, scandir = [], os.scandir
    monkeypatch.setattr(moved_models.os, "scandir", lambda folder: read.append(Path(folder)) or scandir(folder))
    with pytest.raises(ArtefactError) as refusal:
        run.lm()
    project = tmp_path / "a/b/project"
    known = [run.path, run.path.parent, project / "runs", project, tmp_path / "work"]
    assert places(run.path) == known
    for words in (f"is of the model {GONE}, which is not there", ", ".join(map(str, known)), "--lm.name FOLDER"):
        assert words in str(refusal.value)
    assert {folder for folder in read if folder not in known and folder.parent not in known} == set()


def test_weights_are_read_only_of_models_of_the_same_family_and_sizes(run, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        moved_models, "load_model", lambda spec: loaded.append(Path(spec.name).name) or load_model(spec)
    )
    model_at(tmp_path / "work/a_family", model_type="llama")
    model_at(tmp_path / "work/b_layers", n_layer=7)
    model_at(tmp_path / "work/c_code", model_type="mine", auto_map={"AutoConfig": "evil.Config"})
    model_at(tmp_path / "work/d_weights", seed=1)
    model_at(tmp_path / "work/e_damaged")
    (tmp_path / "work/e_damaged/model.safetensors").write_bytes(b"x")
    model_at(tmp_path / "work/f_broken")
    (tmp_path / "work/f_broken/config.json").write_bytes(b"[")
    model_at(tmp_path / "work/g_same")
    (tmp_path / "work/h_link").symlink_to(tmp_path / "work/d_weights")
    with pytest.warns(UserWarning, match="is used in its place"):
        assert run.lm().name == str(tmp_path / "work/g_same")
    assert loaded == ["d_weights", "e_damaged", "g_same"]


def test_folders_of_many_entries_are_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(moved_models, "MOST_ENTRIES", 3)
    for number in range(10):
        (tmp_path / f"{number}").mkdir()
    assert len(list(moved_models._inside(tmp_path))) == 3
    assert [path for path in places(Path("/run")) if path == path.parent] == []


def test_a_run_without_results_says_that_it_cannot_tell(run, tmp_path):
    model_at(tmp_path / "work/model")
    for name in ("circuit", "constants", "studies"):
        shutil.rmtree(run.path / name, ignore_errors=True)
    with pytest.raises(ArtefactError, match=r"has no results yet(.|\n)*--lm.name FOLDER"):
        run.lm()


@pytest.mark.parametrize("left", ["circuit", "constants", "studies"])
@pytest.mark.filterwarnings("default:The model /gone")
def test_any_result_tells_the_weights(run, tmp_path, left):
    for name in {"circuit", "constants", "studies"} - {left}:
        shutil.rmtree(run.path / name, ignore_errors=True)
    if left == "studies":
        (run.path / "studies/scan_0").mkdir(parents=True)
        model = {"family": "gpt2", "fingerprint": moved_models.fingerprint(load_model(LMSpec())), "name": GONE}
        (run.path / "studies/scan_0/results.json").write_text(json.dumps({"model": model}))
    folder = model_at(tmp_path / "work/model")
    assert run.lm().name == str(folder)


@pytest.mark.filterwarnings("default:The model /gone")
def test_commands_find_it_too(run, tmp_path, capsys):
    words = ["minimal", "--run", str(run.path), "--device", "cpu", "--minimal.fit.steps", "0"]
    words += ["--minimal.random_complements", "0", "--data.n_means", "8"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert f"{run.path} is of the model {GONE}, which is not there. It was searched for by the fingerprint" in message
    model_at(tmp_path / "work/model")
    assert main(words) == 0
    assert f"oa-train: warning: The model {GONE} is not there; {tmp_path}/work/model has" in capsys.readouterr().err
    results = json.loads((run.path / "studies/minimal_0/results.json").read_text())
    assert results["model"]["name"] == f"{tmp_path}/work/model"


def test_a_command_line_that_names_a_model_starts_no_search(run, tmp_path):
    (tmp_path / "lm.yaml").write_text("lm: {name: tiny}")
    (tmp_path / "other.yaml").write_text("lm: {bos: none}")
    for words in (["--lm.name", "tiny"], ["--lm.name=tiny"], ["--config", f"{tmp_path}/lm.yaml"]):
        assert stored_config(run, words)["lm"]["name"] == GONE
    with pytest.raises(ArtefactError, match="not there"):
        stored_config(run, ["--config", f"{tmp_path}/other.yaml"])
