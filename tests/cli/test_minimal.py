"""`oa-train minimal` on run folders that are made by hand: what it says, writes and refuses."""

import json
from pathlib import Path

import pytest

from oa_train.ablations.registry import AblationSource
from oa_train.circuits.circuit import Circuit
from oa_train.cli.main import main
from oa_train.models.graph import Graph
from oa_train.models.loading import load_config, load_model
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from tests.builders import small_ioi

FEW = ["--data.n_test", "8", "--data.n_validation", "8", "--data.n_means", "8", "--minimal.fit.steps", "1"]
FEW += ["--minimal.random_complements", "1"]
EDGES = ("input->a0.h0<v>", "a0.h0->logits", "input->m1", "input->m2")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def constants():
    model = load_model(LMSpec())
    return AblationSource(model, small_ioi(n_means=8), Graph.of(model.config)).mean


@pytest.fixture
def run(constants) -> Path:
    folder = Path("runs/nodes/version_0")
    Circuit(Nodes.of(load_config(LMSpec())), ("m0", "a1.h0"), provenance={"model": "tiny"}).save(folder / "circuit")
    constants.save(folder / "constants")
    Path(folder / "config.yaml").write_text("lm: {name: tiny}\ndata: IOI\nseed_everything: 3")
    return folder


@pytest.fixture
def front(constants) -> Path:
    folder = Path("runs/front/version_0")
    for number in ("0", "1"):
        Circuit(Graph.of(load_config(LMSpec())), EDGES).save(folder / "front" / number / "circuit")
        constants.save(folder / "front" / number / "constants")
    Path(folder / "config.yaml").write_text("lm: {name: tiny}\ndata: IOI")
    return folder


def complaint(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_a_run_is_asked(run, capsys):
    Path("more.yaml").write_text("minimal: {refit: true, tolerance: 0.5}")
    assert main(["minimal", "--run", str(run), "--config", "more.yaml", *FEW, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for words in ("2 of 15 components under optimal ablation", "a1.h0", "of 2 components", "random circuit 1"):
        assert words in said, words
    assert "results: runs/nodes/version_0/studies/minimal_0" in said
    assert "studies/minimal_0" in (run / "run.log").read_text()
    results = json.loads((run / "studies" / "minimal_0" / "results.json").read_text())
    assert results["settings"] | {"refit": True, "tolerance": 0.5} == results["settings"]
    assert results["task"]["seed"] == results["seed"] == 3


def test_one_of_several_circuits_is_asked_under_the_configuration_of_their_run(front, capsys):
    assert main(["minimal", "--run", str(front / "front" / "1"), *FEW]) == 0
    said = capsys.readouterr().out
    assert "4 of 262 edges" in said
    assert "superfluous: input->m1, input->m2" in said
    assert "all 2 of them together are worth 0 nats" in said
    assert (front / "front" / "1" / "studies" / "minimal_0" / "figures" / "worth.png").is_file()
    said = complaint(capsys, "minimal", "--run", str(front))
    assert f"several circuits. Give one of them: {front}/front/N, N being 0, 1." in said
    assert "does not exist" in complaint(capsys, "minimal", "--run", str(front / "front" / "7"))
    several = "a run that has trained several circuits side by side"
    assert several in complaint(capsys, "test", "--run", str(front / "front" / "1"))
    assert several in complaint(capsys, "compare", "--run", str(front / "front"))


def test_compare_takes_every_circuit_of_a_run(front, capsys):
    few = ("--compare.random_circuits", "0", "--compare.components", "[]", "--compare.ablations", "[mean,zero]")
    assert main(["compare", "--run", str(front), *few, "--data.n_test", "8", "--data.n_means", "16"]) == 0
    said = capsys.readouterr().out
    assert "results: runs/front/version_0/studies/compare_0" in said
    rows = json.loads((front / "studies" / "compare_0" / "results.json").read_text())["rows"]
    names = [f"front/version_0/front/{number}" for number in (0, 1)]
    assert [(row["run"], row["ablation"]) for row in rows] == [
        (name, kind) for name in names for kind in ("mean", "zero")
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--minimal.tolerance -1", "tolerance is -1.0; expected at least 0."),
        ("--minimal.tolerence 1", "Did you mean minimal.tolerance"),
        ("--minimal.seed 1", "There is no option --minimal.seed; it is called seed_everything now."),
        ("--minimal 3", "minimal is 3; expected a group of options (minimal."),
        ("--run runs/nodes/version_0", "--run is given 2 times"),
        ("--device nowhere", "--device 'nowhere' cannot be used"),
        ("--lm.trust_remote_code", "--lm.trust_remote_code needs a value."),
    ],
)
def test_wrong_options(run, capsys, words, said):
    assert said in complaint(capsys, "minimal", "--run", str(run), *words.split())
    assert not (run / "studies").exists()


def test_wrong_folders(run, capsys):
    assert "minimal needs --run" in complaint(capsys, "minimal")
    assert "a folder that does not exist" in complaint(capsys, "minimal", "--run", "nowhere")
    (run / "circuit" / "tensors.safetensors").unlink()
    assert "oa-train fit --config runs/nodes/version_0/config.yaml" in complaint(capsys, "minimal", "--run", str(run))
    (run / "config.yaml").write_text("lm: {name: tiny, trust_remote_code: true}\ndata: IOI")
    assert "asks to run code that comes with the model" in complaint(capsys, "minimal", "--run", str(run))
