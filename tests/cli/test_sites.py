"""The command line with every kind of site: a fit from a file, its results and figures, and questions asked of it."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from oa_train.ablations.constants import Constants
from oa_train.circuits.circuit import Circuit
from oa_train.cli.main import main
from oa_train.models.dictionaries import Dictionary, save_dictionary

RUN = Path("runs/sites/version_0")
PROMPTS = {"n_means": 8, "n_validation": 8, "n_test": 8, "batch_size": 4, "batches_per_epoch": 2}
FIT = {
    "experiment": "sites",
    "lm": {"name": "tiny"},
    "data": {"class_path": "IOI", "init_args": PROMPTS},
    "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"},
    "finish": {"refit": {"steps": 2, "batch_size": 4, "evaluate_every": 1}},
}
FEW = ["--data.n_test", "8", "--data.n_validation", "8", "--data.n_means", "8"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved_dictionary(folder: str, site: str = "r2", width: int = 64, n_features: int = 12) -> str:
    drawn = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(width, n_features, generator=drawn), torch.randn(n_features, width, generator=drawn)
    dictionary = Dictionary(site, encoder, torch.zeros(n_features), decoder, torch.zeros(width), "relu")
    return str(save_dictionary(dictionary, folder))


def fit_with(**arguments: Any) -> list[str]:
    """The command line of a fit whose module has these arguments, given in a file."""
    model = {"class_path": "CircuitModule", "init_args": {"samples_per_prompt": 2, **arguments}}
    Path("fit.yaml").write_text(yaml.safe_dump(FIT | {"model": model}))
    return ["fit", "--config", "fit.yaml"]


# Arguments of the module, its entries, and names of some of them.
CASES: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "heads and mlps": ({}, 15, ("a0.h0", "m2")),
    "attention": ({"sites": ["attention"]}, 3, ("a0", "a2")),
    "neurons": ({"sites": ["neurons"], "components": ["m1.n1?", "!m1.n15"]}, 384, ("m1.n12",)),
    "residual": ({"sites": ["residual"], "components": "r1"}, 3, ("r1", "r2", "r3")),
    "embedding": ({"sites": ["embedding", "mlp"]}, 4, ("input", "m0")),
    "tokens": ({"sites": ["tokens", "mlp"]}, 4, ("tokens", "m0")),
    "spans": ({"sites": ["mlp", "residual"], "components": ["m*@S2", "r1@S2", "r1@end"]}, 7, ("m1@S2", "r1@end")),
    "last token": ({"components": ["a2.h1@-1", "m*"]}, 15, ("a2.h1@-1", "m1")),
    "weights by kind": ({"sites": ["heads", "neurons"], "penalty_weight": {"heads": 0.1, "neurons": 0.01}}, 396, ()),
    "ablation": ({"sites": ["neurons"], "ablation": "resample"}, 384, ("m0.n3",)),
}


def results_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("results.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_fit_ends_with_a_circuit_results_and_figures(case, capsys):
    arguments, n_entries, names = CASES[case]
    assert main(fit_with(**arguments)) == 0
    assert f"of {n_entries} components kept" in capsys.readouterr().out
    circuit, results = Circuit.load(RUN / "circuit"), results_of(RUN / "studies" / "fit_0")
    assert set(names) <= set(circuit.level.names)
    assert results["circuit"] == {"nodes": len(circuit), "nodes_total": n_entries}
    assert results["penalty_weight"] == arguments.get("penalty_weight", 0.05)
    assert [row["component"] for row in results["rows"]] == list(circuit.level.names)
    assert all(0 <= row["keep_probability"] <= 1 for row in results["rows"])
    drawn = {path.name for path in (RUN / "studies" / "fit_0" / "figures").iterdir()}
    assert drawn == {"keep_probability.png"} | ({"circuit.png"} if circuit.level.grid else set())
    if "ablation" not in arguments:
        Constants.load(RUN / "constants").check_fits(circuit.level)
    patterns = arguments.get("components", "*")
    free = circuit.level.selected([patterns] if isinstance(patterns, str) else patterns)
    assert circuit.mask[~free].all()


@pytest.fixture
def at_spans() -> Path:
    assert main(fit_with(**CASES["spans"][0], penalty_weight=1.0, mask_learning_rate=0.01)) == 0
    return RUN


def test_questions_are_asked_of_a_circuit_at_spans(at_spans, capsys):
    assert main(["test", "--run", str(at_spans)]) == 0
    assert "test/kl" in capsys.readouterr().out
    settings = ["--compare.random_circuits", "1", "--compare.fit.steps", "1", "--compare.circuit_fit.steps", "1"]
    assert main(["compare", "--run", str(at_spans), *FEW, *settings]) == 0
    rows = results_of(at_spans / "studies" / "compare_0")["rows"]
    assert {row["component"] for row in rows} == {"circuit", *Circuit.load(at_spans / "circuit").level.names}
    assert {"m1@S2", "r1@end"} <= {row["component"] for row in rows}
    assert {row["ablation"] for row in rows} >= {"optimal", "mean", "zero", "resample", "noise", "counterfactual"}
    settings = ["--minimal.random_complements", "1", "--minimal.fit.steps", "1", "--minimal.refit", "true"]
    assert main(["minimal", "--run", str(at_spans), *FEW, *settings]) == 0
    rows = results_of(at_spans / "studies" / "minimal_0")["rows"]
    assert {row["component"] for row in rows} <= {"m0@S2", "m1@S2", "m2@S2", "r1@S2", "r1@end"}
    for study in ("compare_0", "minimal_0"):
        assert list((at_spans / "studies" / study / "figures").glob("*.png"))
        assert list((at_spans / "studies" / study / "tables").glob("*.csv"))


def test_features_of_a_dictionary(capsys):
    arguments = {"sites": ["features", "mlp"], "dictionaries": [{"path": saved_dictionary("sae"), "site": "r2"}]}
    assert main(fit_with(**arguments, components=["f2.*", "m1"])) == 0
    circuit = Circuit.load(RUN / "circuit")
    assert circuit.level.names == ("m0", "m1", *(f"f2.{number}" for number in range(12)), "m2")
    assert results_of(RUN / "studies" / "fit_0")["circuit"]["nodes_total"] == 15
    assert main(["test", "--run", str(RUN)]) == 0
    settings = ["--compare.random_circuits", "0", "--compare.components", "f2.1"]
    settings += ["--compare.ablations", "[mean,zero]"]
    assert main(["compare", "--run", str(RUN), *FEW, *settings]) == 0
    capsys.readouterr()
    # The circuit is of a dictionary that has been moved.
    Path("sae").rename("moved")
    assert main(["compare", "--run", str(RUN), *FEW, *settings]) == 2
    assert "sae/dictionary.safetensors does not exist" in capsys.readouterr().err


def test_two_dictionaries_of_different_layers():
    paths = [{"path": saved_dictionary("first", "m0", n_features=3)}, {"path": saved_dictionary("second", "r3")}]
    assert main(fit_with(sites=["features"], dictionaries=paths)) == 0
    names = Circuit.load(RUN / "circuit").level.names
    assert (names[0], names[-1], len(names)) == ("f0.0", "f3.11", 15)


def test_several_circuits_have_their_penalty_weights_in_their_results():
    assert main(fit_with(sites=["mlp", "attention"], penalty_weight=[0.5, 0.01])) == 0
    results = results_of(RUN / "studies" / "fit_0")
    of_ablation = [row for row in results["rows"] if row["ablation"] == "optimal"]
    assert [row["penalty_weight"] for row in of_ablation] == [0.5, 0.01]
    with (RUN / "studies" / "fit_0" / "tables" / "front.csv").open() as file:
        assert {row["penalty_weight"] for row in csv.DictReader(file)} == {"0.5", "0.01"}
    assert (RUN / "front" / "1" / "circuit").is_dir()


# Arguments of the module, and what is said of them.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown kind": ({"sites": ["heads", "nuerons"]}, "sites names 'nuerons'. Did you mean neurons"),
    "a kind twice": ({"sites": ["heads", "heads"]}, "expected kinds of site, each once"),
    "no kind": ({"sites": []}, "sites is []; expected kinds of site"),
    "pattern of a kind that is lacking": (
        {"components": ["a*", "m1.n3"]},
        "It would match units of the kind 'neurons', which sites does not name.",
    ),
    "unit with and without a span": (
        {"components": ["m1", "m*@S2"]},
        "'m1' selects m1 at every token, and another one selects it at a span",
    ),
    "features without a dictionary": (
        {"sites": ["features"]},
        "sites names features, which are those of a dictionary",
    ),
    "spans of edges": ({"level": "edges", "components": "m*@S2"}, "names a span. Spans are for circuits of nodes"),
    "sites of edges": ({"level": "edges", "sites": ["neurons"]}, "sites is ['neurons'], and level is edges"),
    "a weight of another kind": ({"penalty_weight": {"heads": 0.1}}, "expected one for each kind that can be ablated"),
    "no weight": ({"penalty_weight": {"heads": 0.0, "mlp": 0.0}}, "has no kind of site with a weight above 0"),
    "clean": ({"ablation": "clean"}, "ablation is 'clean', which restores the model's own values"),
    "penalty": ({"penalty": 0.1}, "CircuitModule has no argument 'penalty'; it is called 'penalty_weight' now."),
    "graph": ({"graph": "edges"}, "CircuitModule has no argument 'graph'; it is called 'level' now."),
    "checkpointing": ({"activation_checkpointing": True}, "it is called 'recompute' now."),
}


def complaint(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("oa-train: error: ")
    assert "Traceback" not in said
    assert not list(Path().rglob("*.safetensors")) or Path("sae").exists()
    return said


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_the_choice_of_sites(case, capsys):
    arguments, said = MISTAKES[case]
    assert said in complaint(capsys, *fit_with(**arguments))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.penalty 0.1", "CircuitModule has no argument 'penalty'; it is called 'penalty_weight' now."),
        ("--model.graph edges", "CircuitModule has no argument 'graph'; it is called 'level' now."),
        ("--model.activation_checkpointing true", "it is called 'recompute' now."),
        ("--model.init_args.penalty 0.1", "it is called 'penalty_weight' now."),
        ("--model.sites nuerons", "nuerons"),
    ],
)
def test_mistakes_in_options(capsys, option, said):
    fit = ["fit", "--model", "CircuitModule", "--data", "IOI"]
    assert said in complaint(capsys, *fit, *option.split())
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("dictionary", "said"),
    [
        ({"width": 7}, "has width 7, the model 64"),
        ({"site": "r9"}, "There is no site 'r9' in a model of 3 layers"),
    ],
)
def test_dictionaries_of_another_model(capsys, dictionary, said):
    path = saved_dictionary("sae", **dictionary)
    assert said in complaint(capsys, *fit_with(sites=["features"], dictionaries=[{"path": path}]))
    assert not Path("runs").exists()


def test_dictionaries_that_cannot_be_read(capsys):
    def said(*specs: dict[str, str]) -> str:
        return complaint(capsys, *fit_with(sites=["features"], dictionaries=list(specs)))

    assert "nowhere does not exist" in said({"path": "nowhere"})
    Path("other").mkdir()
    Path("other/weights.pt").write_bytes(b"")
    assert "is not a dictionary of a known layout" in said({"path": "other"})
    path = saved_dictionary("sae")
    assert "reads at r2, not at m1" in said({"path": path, "site": "m1"})
    assert "Two dictionaries are in the same layer" in said({"path": path}, {"path": saved_dictionary("sae2", "m2")})
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("m*@S3", "There is no span 'S3' in these prompts. Valid names: IO, S1, S2, end."),
        ("m*@-99", "The span '-99' is empty"),
    ],
)
def test_spans_that_the_prompts_lack_leave_no_half_made_files(capsys, pattern, said):
    assert said in complaint(capsys, *fit_with(components=[pattern]))
    left = {path.name for path in Path("runs").rglob("*") if path.is_file()} if Path("runs").exists() else set()
    assert not {name for name in left if name.startswith((".", "results", "artefact", "tensors"))}
    assert not [name for name in left if name.endswith((".ckpt", ".partial", ".png"))]


def test_spans_that_share_a_token_are_refused(capsys):
    # The last token is the end.
    assert "The spans 'end' and '-1' share a token" in complaint(capsys, *fit_with(components=["m1@end", "m1@-1"]))
