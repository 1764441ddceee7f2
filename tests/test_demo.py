"""The demonstration from the command line, and what it must show on the built-in model."""

import json
import re
import statistics
from pathlib import Path

import pytest

from oa_train import Circuit, Constants, LMSpec, ablated, load_model
from oa_train.ablations.registry import ABLATION_KINDS
from oa_train.cli.main import main
from oa_train.tasks.encoding import load_tokenizer
from tests.jobs.fits import ROOT, done
from tests.test_recorded_circuits import assert_as_recorded


@pytest.fixture(scope="module", params=["short", pytest.param("whole", marks=pytest.mark.long)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the demonstration, or of its fit and a comparison with fewer random circuits."""
    folder = tmp_path_factory.mktemp("demo")
    run = Path("runs", "circuit_nodes_tiny", "version_0")
    if request.param == "whole":
        assert "Where to look" in done(folder, "demo")
    else:
        done(folder, "fit", "--config", str(ROOT / "configs" / "circuit_nodes_tiny.yaml"))
        done(folder, "compare", "--run", str(run), "--compare.random_circuits", "4", "--compare.fit.steps", "50")
    return folder / run


@pytest.fixture(scope="module")
def compared(run: Path) -> dict:
    return json.loads((run / "studies" / "compare_0" / "results.json").read_text())


def test_the_circuit_is_small_and_faithful(run):
    results = json.loads((run / "studies" / "fit_0" / "results.json").read_text())
    assert results["circuit"]["nodes"] <= 7
    assert results["metrics"]["kl"]["mean"] <= 0.03
    assert results["metrics"]["accuracy"]["mean"] > 0.99
    assert_as_recorded(run, "circuit_nodes_tiny")


def test_mean_and_zero_are_worse_on_the_circuit(compared):
    circuit = {row["ablation"]: row for row in compared["rows"] if row["component"] == "circuit"}
    for ablation in ("mean", "zero"):
        assert circuit[ablation]["kl_minus_optimal"]["ci95"][0] > 0


def test_random_circuits_of_equal_size_are_far_worse(compared):
    circuit = next(row for row in compared["rows"] if row["ablation"] == "optimal")
    (drawn,) = compared["random_circuits"]
    assert drawn["size"] == compared["circuit"]["nodes"]
    kl = drawn["kl"]
    assert len(kl) == compared["settings"]["random_circuits"]
    assert statistics.median(kl) >= 10 * circuit["kl"]["mean"]


def test_each_component_alone_obeys_the_law_of_optimal_ablation(compared):
    others = [row for row in compared["rows"] if row["component"] != "circuit" and row["ablation"] in ("mean", "zero")]
    assert len(others) == 30
    for row in others:
        assert_optimal_is_not_worse(row)


def assert_optimal_is_not_worse(row: dict) -> None:
    upper_bound = -row["kl_minus_optimal"]["ci95"][0]
    assert upper_bound <= max(1e-4, 0.02 * row["kl"]["mean"]), (row["component"], row["ablation"])


@pytest.mark.long
@pytest.mark.parametrize("run", ["short"], indirect=True)
def test_constants_per_position_obey_the_law_against_resample_on_prompts_of_one_length(run):
    words = ["--data.n_tokens", "19", "--compare.positions", "every", "--compare.random_circuits", "0"]
    words += ["--data.n_test", "1024", "--compare.circuit_fit.steps", "100"]
    assert main(["compare", "--run", str(run), "--quiet", *words, "--compare.ablations", "[optimal, resample]"]) == 0
    results = json.loads((run / "studies" / "compare_1" / "results.json").read_text())
    assert results["positions"] == results["task"]["n_tokens"] == 19
    rows = [row for row in results["rows"] if row["ablation"] == "resample"]
    assert len(rows) == 16
    for row in rows:
        assert_optimal_is_not_worse(row)


def test_counterfactual_ablation_is_told_apart_as_not_total(compared):
    assert {row["ablation"] for row in compared["rows"] if not row["total"]} == {"counterfactual"}
    assert {row["ablation"] for row in compared["rows"]} == {
        name for name, kind in ABLATION_KINDS.items() if not kind.restores
    }


def test_everything_is_where_the_demo_says(run):
    for path in (
        "config.yaml",
        "metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "circuit/artefact.json",
        "constants/tensors.safetensors",
        "studies/fit_0/figures/circuit.png",
        "studies/fit_0/figures/keep_probability.png",
        "studies/compare_0/tables/comparison.csv",
        "studies/compare_0/figures/comparison.png",
    ):
        assert (run / path).stat().st_size > 0, path
    assert list(run.glob("events.out.tfevents.*"))


def test_tensorboard_has_the_curves_and_the_heat_map(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    scalars = {"train/loss", "train/kl", "train/penalty", "train/size"}
    scalars |= {f"val/{name}" for name in ("kl", "accuracy", "logit_difference", "size", "objective")}
    assert scalars <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["masks/keep_probability"]
    assert len(events.Images("masks/keep_probability")) == 10


def test_the_ablated_model_still_does_the_task(run):
    model, tokenizer = load_model(LMSpec("tiny")), load_tokenizer(LMSpec("tiny"))
    circuit, constants = Circuit.load(run / "circuit"), Constants.load(run / "constants")
    prompt = "While Tom was busy, Anna and Paul met at the park. Paul handed the ring to"
    tokens = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt").input_ids
    with ablated(model, circuit, constants):
        continued = model.generate(tokens, max_new_tokens=1, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(continued[0, -1]).strip() == "Anna"


def test_a_run_is_evaluated_again_from_its_folder(run, capsys):
    results = json.loads((run / "studies" / "fit_0" / "results.json").read_text())
    for checkpoint in ("best", "last", str(run / "checkpoints" / "last.ckpt")):
        assert main(["test", "--run", str(run), "--ckpt", checkpoint, "--trainer.enable_progress_bar", "false"]) == 0
        shown = capsys.readouterr().out
        assert float(re.search(r"test/size\D+([\d.]+)", shown)[1]) == results["circuit"]["nodes"]
        # Before the refit the constants are somewhat worse.
        assert results["metrics"]["kl"]["mean"] <= float(re.search(r"test/kl\D+([\d.]+)", shown)[1]) < 0.1
    assert main(["validate", "--run", str(run), "--trainer.enable_progress_bar", "false"]) == 0
    assert "val/kl" in capsys.readouterr().out
