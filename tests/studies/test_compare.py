"""Comparing ablations on the built-in model: one run, several runs, and the laws between ablations."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from oa_train.ablations.constants import Constants
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import ABLATION_KINDS
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.circuits.circuit import Circuit
from oa_train.circuits.published import published_ioi_circuit
from oa_train.errors import ConfigurationError, TaskError
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.studies.compare import Compare, CompareSettings
from oa_train.studies.finish_circuits import FinishSettings, finish
from oa_train.studies.overlap import over_seeds
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, save_language_model, small_ioi

QUICK = RefitSettings(steps=60, batch_size=8, evaluate_every=30)
BRIEF = RefitSettings(steps=20, batch_size=8, evaluate_every=10)
UNFITTED = RefitSettings(steps=0)
KEPT = ("a0.h0", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3")
TAKING = [name for name, kind in ABLATION_KINDS.items() if not kind.restores]
FEW = ["a0.h0", "m0", "m1"]


@pytest.fixture(scope="module")
def task():
    return small_ioi(n_validation=32, n_test=64, n_means=64)


@pytest.fixture(scope="module")
def module(task):
    module = CircuitModule()
    quiet_trainer(max_steps=1).fit(module, datamodule=TaskData(task))
    module.masks.distribution.logits.data.copy_(torch.where(module.level.mask(KEPT), 3.0, -3.0))
    return module


@pytest.fixture(scope="module")
def run(module, task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment") / "version_0"
    finish(module.frozen, task, module.trained_circuits(), folder, FinishSettings(refit=QUICK))
    return folder


@pytest.fixture(scope="module")
def trained(run):
    return TrainedCircuit.load(run)


@pytest.fixture(scope="module")
def compared(module, task, run, trained):
    return compare(module.frozen, task, [trained], run, CompareSettings(fit=QUICK, random_circuits=2))


def compare(model, task, runs, folder, settings=None):
    """Compare, and write what comes of it into a run folder."""
    return Compare(model, task, runs, settings).run_in(folder)


def kl_of(findings, ablation: str, **values) -> float:
    """KL divergence of the first circuit with these values."""
    return findings.where(component="circuit", ablation=ablation, **values)[0]["kl"].mean


def test_there_is_a_row_for_the_circuit_and_each_component_under_each_ablation(compared, module):
    results = json.loads((compared.folder / "results.json").read_text())
    expected = [(name, kind) for name in ("circuit", *module.level.names) for kind in TAKING]
    assert [(row["component"], row["ablation"]) for row in results["rows"]] == expected
    assert {row["ablation"] for row in results["rows"] if not row["total"]} == {"counterfactual"}
    with (compared.folder / "tables" / "comparison.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["kl"]) for row in table] == [row["kl"]["mean"] for row in results["rows"]]
    assert (compared.folder / "figures" / "comparison.png").stat().st_size > 10_000
    assert not (compared.folder / "figures" / "agreement.png").exists()


def test_results_name_the_run_and_its_circuit(compared, run):
    results = json.loads((compared.folder / "results.json").read_text())
    (described,) = results["runs"]
    assert described["name"] == f"{run.parent.name}/version_0"
    assert described["trained_with"] == "optimal"
    assert tuple(described["nodes"]) == KEPT
    assert results["circuit"] == {"nodes": 7, "nodes_total": 15}
    assert results["jaccard"] == [[1.0]]
    assert results["seeds"] == []
    assert results["positions"] == 1
    assert [(drawn["size"], len(drawn["kl"])) for drawn in results["random_circuits"]] == [(7, 2)]
    assert results["settings"]["fit"]["steps"] == 60
    assert results["settings"]["circuit_fit"]["steps"] == 300


def test_differences_are_paired(compared):
    by_name = {(row["component"], row["ablation"]): row for row in compared.rows}
    for row in compared.rows:
        optimal = by_name[row["component"], "optimal"]
        difference = row["kl_minus_optimal"]
        assert difference.mean == pytest.approx(row["kl"].mean - optimal["kl"].mean, abs=1e-9)
        if row["ablation"] == "optimal":
            assert difference.stderr == 0
    mean, optimal = by_name["circuit", "mean"], by_name["circuit", "optimal"]
    # Prompts that are hard under one ablation are hard under the other, so pairing narrows the interval.
    apart = (mean["kl"].stderr ** 2 + optimal["kl"].stderr ** 2) ** 0.5
    assert mean["kl_minus_optimal"].stderr < apart


def test_optimal_is_at_most_mean_and_zero_for_every_component(compared):
    # The strict law, on the upper bound of the interval, needs more prompts: tests/test_demo.py.
    for row in compared.rows:
        if row["ablation"] in ("mean", "zero"):
            surely_worse = -row["kl_minus_optimal"].ci95[1]
            assert surely_worse <= max(1e-4, 0.03 * row["kl"].mean), (row["component"], row["ablation"])


def test_constants_per_position_are_at_most_resample_on_prompts_of_one_length(module, run, trained):
    task = small_ioi(n_validation=32, n_test=32, n_means=64, n_tokens=16)
    settings = CompareSettings(
        ablations=["optimal", "resample", "mean"],
        components=["a0.h0", "m1"],
        positions="every",
        fit=QUICK,
        circuit_fit=QUICK,
        random_circuits=0,
    )
    findings = compare(module.frozen, task, [trained], run, settings)
    assert json.loads((findings.folder / "results.json").read_text())["positions"] == 16
    for row in findings.rows:
        excess = -row["kl_minus_optimal"].mean
        assert excess <= max(1e-4, 0.03 * row["kl"].mean), (row["component"], row["ablation"])
    assert kl_of(findings, "optimal") < 0.5 * kl_of(findings, "resample")


def test_random_circuits_are_worse(compared):
    (drawn,) = compared.facts["random_circuits"]
    assert (drawn["size"], len(drawn["kl"])) == (7, 2)
    # After the same training: the run's own constants had more.
    assert min(drawn["kl"]) > 2 * drawn["run_kl"]
    assert drawn["percentile"] == 100 * sum(kl <= drawn["run_kl"] for kl in drawn["kl"]) / 2
    assert drawn["run_kl"] >= 0.9 * kl_of(compared, "optimal")


def test_several_runs_stand_side_by_side(module, task, trained, tmp_path):
    provenance = dict(trained.circuit.provenance)
    other = Circuit(module.level, (*KEPT[:6], "m2"), None, provenance | {"seed": 1})
    resampled = Circuit(module.level, KEPT[:5], None, provenance | {"ablation": "resample"})
    runs = [
        trained,
        TrainedCircuit("experiment/version_1", other, trained.constants),
        TrainedCircuit("elsewhere/version_0", resampled),
    ]
    settings = CompareSettings(["optimal", "resample"], components=[], circuit_fit=BRIEF, random_circuits=0)
    findings = compare(module.frozen, task, runs, tmp_path, settings)
    assert [(row["run"], row["ablation"]) for row in findings.rows] == [
        (run.name, kind) for run in runs for kind in ("optimal", "resample")
    ]
    assert findings.facts["jaccard"][0] == [1.0, 6 / 8, 5 / 7]
    (group,) = findings.facts["seeds"]
    assert group["runs"] == [trained.name, "experiment/version_1"]
    assert group["seeds"] == [0, 1]
    assert group["ablation"] == group["trained_with"] == "optimal"
    assert group["jaccard"] == 6 / 8
    first, second = (kl_of(findings, "optimal", run=run.name) for run in runs[:2])
    assert group["kl"]["mean"] == pytest.approx((first + second) / 2)
    assert group["size"] == {"mean": 7.0, "standard_deviation": 0.0, "ci95": [7.0, 7.0], "n": 2}
    assert (findings.folder / "figures" / "agreement.png").stat().st_size > 10_000
    rows = json.loads((findings.folder / "results.json").read_text())["rows"]
    assert [row["trained_with"] for row in rows] == ["optimal"] * 4 + ["resample"] * 2


def test_a_circuit_trained_otherwise_is_given_constants_of_its_own(module, task, trained, tmp_path):
    zero = replace(trained.constants.mapped(torch.zeros_like), provenance={"ablation": "zero"})
    circuit = replace(trained.circuit, provenance=dict(trained.circuit.provenance) | {"ablation": "zero"})
    settings = CompareSettings(["optimal", "mean", "zero"], components=[], circuit_fit=QUICK, random_circuits=0)
    findings = compare(module.frozen, task, [TrainedCircuit("zero", circuit, zero)], tmp_path, settings)
    assert kl_of(findings, "optimal") < 0.5 * min(kl_of(findings, "mean"), kl_of(findings, "zero"))


def test_a_second_comparison_gets_a_folder_of_its_own(module, task, trained, tmp_path):
    settings = CompareSettings(["mean"], components=[], fit=UNFITTED, random_circuits=0)
    folders = [compare(module.frozen, task, [trained], tmp_path, settings).folder.name for _ in range(2)]
    assert folders == ["compare_0", "compare_1"]


def test_a_circuit_written_by_hand_is_compared(module, task, tmp_path):
    circuit = Circuit.from_patterns(module.level, ["a0*", "a1*", "m0"])
    constants = Constants.zeros(module.level, 4)
    settings = CompareSettings(
        ["optimal", "zero"], components=FEW, fit=UNFITTED, circuit_fit=UNFITTED, random_circuits=0
    )
    findings = compare(module.frozen, task, [TrainedCircuit("by hand", circuit, constants)], tmp_path, settings)
    results = json.loads((findings.folder / "results.json").read_text())
    assert results["model"]["fingerprint"] == module.fingerprint
    assert results["positions"] == 4
    assert kl_of(findings, "optimal") == kl_of(findings, "zero")


@pytest.mark.parametrize("changed", ["task", "loss"])
def test_constants_for_other_prompts_or_another_loss_are_a_start_and_no_more(module, task, trained, tmp_path, changed):
    provenance = dict(trained.constants.provenance)
    provenance |= {"task": provenance["task"] | {"name": "other"}} if changed == "task" else {"loss": "cross_entropy"}
    bad = replace(trained.constants.mapped(lambda table: table + 1), provenance=provenance)
    settings = CompareSettings(["optimal", "mean"], components=[], circuit_fit=QUICK, random_circuits=0)
    foreign = compare(module.frozen, task, [replace(trained, constants=bad)], tmp_path, settings)
    assert kl_of(foreign, "optimal") < kl_of(foreign, "mean")
    own = replace(bad, provenance=trained.constants.provenance)
    kept = compare(module.frozen, task, [replace(trained, constants=own)], tmp_path, settings)
    assert kl_of(kept, "optimal") > kl_of(foreign, "optimal")


def test_runs_that_differ_in_more_than_their_seed_are_no_sample(trained):
    def like(name: str, seed: int, **training) -> TrainedCircuit:
        provenance = dict(trained.circuit.provenance)
        provenance |= {"seed": seed, "training": provenance["training"] | training}
        return TrainedCircuit(name, replace(trained.circuit, provenance=provenance), trained.constants)

    kl = dict.fromkeys("abcd", 0.1)
    assert over_seeds([like("a", 0), like("b", 1, penalty_weight=3.0)], kl, "optimal") == []
    assert over_seeds([like("a", 0), like("b", 0)], kl, "optimal") == []
    (group,) = over_seeds([like("a", 0), like("b", 1), like("c", 1), like("d", 2, loss="kl2")], kl, "optimal")
    assert group["runs"] == ["a", "b"]


def test_a_task_without_counterfactuals_is_compared_without_them(module, trained, tmp_path, monkeypatch):
    task = small_ioi(n_means=64)
    draw = task.draw
    monkeypatch.setattr(task, "draw", lambda random: replace(draw(random), counterfactual=None))
    settings = CompareSettings(components=[], fit=UNFITTED, random_circuits=0)
    findings = compare(module.frozen, task, [trained], tmp_path, settings)
    assert [row["ablation"] for row in findings.rows] == [
        kind for kind in TAKING if not kind.startswith("counterfactual")
    ]
    with pytest.raises(TaskError, match="no counterfactuals"):
        compare(module.frozen, task, [trained], tmp_path, replace(settings, ablations=["counterfactual"]))


def test_resample_is_left_out_where_a_prompt_has_no_partner(module, trained, tmp_path, monkeypatch):
    task = small_ioi(n_means=64)
    prompt = task.prompt

    def longer(stream, index):
        drawn = prompt(stream, index)
        before = "Then, " * 7 if stream == "test" and index < 3 else ""
        return replace(drawn, text=before + drawn.text, counterfactual=None, spans={})

    monkeypatch.setattr("oa_train.tasks.partners.FURTHER_PROMPTS", 300)
    monkeypatch.setattr(task, "prompt", longer)
    settings = CompareSettings(components=[], fit=UNFITTED, random_circuits=0)
    findings = compare(module.frozen, task, [trained], tmp_path, settings)
    assert [row["ablation"] for row in findings.rows] == ["optimal", "mean", "mean_by_position", "zero", "noise"]
    (line,) = (line for line in findings.shown if str(line).startswith("Left out: resample"))
    assert line.startswith("Left out: resample ablation, because 3 of")
    with pytest.raises(TaskError, match=r"no resample ablation: 3 of \d+ prompts have no partner"):
        Compare(module.frozen, task, [trained], replace(settings, ablations=["resample"]))  # nothing has been run


def test_the_published_circuit_is_compared_in_a_model_of_its_shape(tmp_path):
    lm = save_language_model("gpt2", tmp_path / "lm", n_layer=12, n_head=12, n_embd=24)
    model, task = load_model(lm), small_ioi(lm=lm, n_validation=4, n_test=4, n_means=4)
    circuit = published_ioi_circuit(Graph.of(model.config))
    settings = CompareSettings(
        ["optimal", "mean"], components=[], circuit_fit=replace(QUICK, steps=2), random_circuits=0
    )
    findings = compare(model, task, [TrainedCircuit("published", circuit)], tmp_path, settings)
    assert json.loads((findings.folder / "results.json").read_text())["circuit"]["edges"] == 963
    # Two steps of training cannot do harm beyond what four prompts tell.
    assert kl_of(findings, "optimal") <= 1.1 * kl_of(findings, "mean")


def test_what_cannot_be_compared_is_refused(module, task, trained, tmp_path):
    with pytest.raises(ConfigurationError, match="different names"):
        compare(module.frozen, task, [trained, trained], tmp_path)
    with pytest.raises(ConfigurationError, match="matches no component"):
        compare(module.frozen, task, [trained], tmp_path, CompareSettings(components="a9*"))
    with pytest.raises(ConfigurationError, match="ablations is empty"):
        CompareSettings(ablations=[])
    with pytest.raises(ConfigurationError, match="twice"):
        CompareSettings(ablations=["mean", "zero", "mean"])
    with pytest.raises(ConfigurationError, match="positions is 0"):
        CompareSettings(positions=0)
    with pytest.raises(ConfigurationError, match="random_circuits is -1"):
        CompareSettings(random_circuits=-1)
    smaller = replace(trained, constants=trained.constants.with_positions(3))
    with pytest.raises(ConfigurationError, match="tell 3 positions apart"):
        compare(module.frozen, task, [smaller], tmp_path, CompareSettings(positions=2))
