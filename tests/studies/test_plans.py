"""What studies say before they begin is what they then do; repeated prompts and missed sizes are said."""

import json
from dataclasses import replace

import pytest
import torch

from oa_train.ablations.evaluation import CleanLogits, circuit_behaviour
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.ablations.worst_mask import AscentSettings
from oa_train.circuits.circuit import Circuit
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.studies import compare as compare_module
from oa_train.studies.compare import Compare, CompareSettings
from oa_train.studies.curve import Curve, CurveSettings
from oa_train.studies.finish_circuits import FinishSettings, finish
from oa_train.studies.minimal import Minimal, MinimalSettings
from oa_train.studies.robustness import Robustness, RobustnessSettings
from tests.builders import small_ioi
from tests.test_progress import Told

BRIEF = RefitSettings(steps=2, batch_size=2, evaluate_every=2)


@pytest.fixture(scope="module")
def task():
    return small_ioi(n_validation=4, n_test=6, n_means=4)


@pytest.fixture(scope="module")
def model():
    return load_model(small_ioi().lm)


def a_circuit(model, level, ablation="optimal", **training) -> TrainedCircuit:
    scores = torch.linspace(0, 1, len(level))
    provenance = {"ablation": ablation, "loss": "kl", "training": {"threshold": 0.5} | training}
    return TrainedCircuit("run", Circuit.from_mask(level, scores > 0.5, scores, provenance))


def check_plan(study) -> Told:
    told = Told()
    study.track = told
    planned = study.plan()
    study.answer()
    assert all(done == passes for _, passes, done in told.stages_told)
    foreseen = [stage for stage in told.stages_told if "superfluous" not in stage[0]]
    assert [stage.passes for stage in planned] == [passes for _, passes, _ in foreseen]
    last = len(told.stages_told)
    assert told.stages_told[-1][0].startswith(f"{last} of {last}  ")
    assert f"{sum(stage.passes for stage in planned):,} passes" in told.lines[0]
    return told


@pytest.mark.parametrize("kind", [Nodes, Graph])
@pytest.mark.parametrize("ablations", [None, ["noise"], ["counterfactual_mean", "optimal"]])
def test_compare_does_what_it_says(model, task, kind, ablations):
    settings = CompareSettings(
        ablations, ["a0.h0", "m1"], fit=BRIEF, circuit_fit=BRIEF, random_circuits=2, random_fit=BRIEF, random_prompts=4
    )
    check_plan(Compare(model, task, [a_circuit(model, kind.of(model.config))], settings))


@pytest.mark.parametrize(("ablation", "refit"), [("optimal", False), ("resample", False)])
def test_minimal_does_what_it_says(model, task, ablation, refit):
    trained, nodes = a_circuit(model, Nodes.of(model.config), ablation), Nodes.of(model.config)
    if ABLATION_KINDS[ablation].constant:
        trained = TrainedCircuit("run", trained.circuit, AblationSource(model, task, nodes).mean)
    check_plan(Minimal(model, task, [trained], MinimalSettings(refit, 0.0, 2, BRIEF)))


@pytest.mark.parametrize(("kind", "refit"), [(Nodes, True), (Graph, False)])
def test_curve_does_what_it_says(model, task, kind, refit):
    settings = CurveSettings(ablations=["optimal", "noise"], fractions=[0.5], refit=refit, fit=BRIEF, random_orders=2)
    check_plan(Curve(model, task, [a_circuit(model, kind.of(model.config))], settings))
    check_plan(Curve(model, task, settings=replace(settings, rankings=["random"], components="m0")))


@pytest.mark.parametrize("n_subsets", [0, 2])
def test_robustness_does_what_it_says(model, task, n_subsets):
    ascent = AscentSettings(steps=2, random_starts=1, n_prompts=3)
    settings = RobustnessSettings(["optimal", "zero"], n_subsets, [0.2, 0.5], ascent, fit=BRIEF)
    check_plan(Robustness(model, task, [a_circuit(model, Nodes.of(model.config), "zero")], settings))


@pytest.mark.parametrize("start", ["trained", "mean", "both"])
def test_a_fit_s_end_does_what_it_says(model, task, start, tmp_path):
    level, told = Nodes.of(model.config), Told()
    trained = TrainedCircuit("run", a_circuit(model, level).circuit, AblationSource(model, task, level).mean)
    finish(model, task, [trained], tmp_path, FinishSettings(BRIEF, start), told)
    assert all(done == passes for _, passes, done in told.stages_told)
    total = sum(passes for _, passes, _ in told.stages_told)
    assert told.lines[0].startswith(f"fit: {total:,} passes over prompts of up to")


def test_the_clean_model_runs_once_on_each_prompt(model, task):
    nodes, runs = Nodes.of(model.config), []
    batches = list(task.batches("test", 6, 3))
    mean, masks = AblationSource(model, task, nodes).mean, torch.zeros(1, len(nodes), dtype=torch.bool)
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    clean = CleanLogits(model)
    first = circuit_behaviour(model, batches, nodes, masks, [mean], clean=clean)
    assert len(runs) == 4
    second = circuit_behaviour(model, batches, nodes, masks, [mean], clean=clean)
    assert len(runs) == 6
    handle.remove()
    assert torch.equal(first.kl, second.kl)
    forgetful = CleanLogits(model, most_bytes=0)
    assert torch.equal(circuit_behaviour(model, batches, nodes, masks, [mean], clean=forgetful).kl, first.kl)


class Repeating(type(small_ioi())):
    """Three prompts, again and again."""

    name = "repeating"

    def prompt(self, stream, index):
        return super().prompt(stream, index % 3)


def test_distinct_prompts_are_counted_and_stored(model, tmp_path):
    task = Repeating(n_validation=4, n_test=12, n_means=2)
    nodes = Nodes.of(model.config)
    trained = TrainedCircuit("run", a_circuit(model, nodes).circuit, AblationSource(model, task, nodes).mean)
    findings = finish(model, task, [trained], tmp_path, FinishSettings(RefitSettings(steps=0))).findings
    assert findings.metrics["kl"].n == 3
    assert "12 held-out prompts, 3 of them distinct, which intervals count" in findings.shown[0].title
    stored = json.loads((findings.folder / "results.json").read_text())["task"]["distinct_prompts"]
    assert stored == {"means": 2, "validation": 3, "test": 3}


def test_single_parts_of_a_large_model_are_left_out_and_that_is_said(model, task, monkeypatch):
    monkeypatch.setattr(compare_module, "MOST_ALONE", 14)
    settings = CompareSettings(["mean"], random_circuits=0)
    findings = Compare(model, task, [a_circuit(model, Nodes.of(model.config))], settings).run()
    assert not [row for row in findings.rows if row["component"] != "circuit"]
    assert any("No component was ablated alone: the model has 15" in str(part) for part in findings.shown)


def test_it_is_said_how_the_entries_were_chosen(model):
    trained = a_circuit(model, Nodes.of(model.config))
    assert trained.criterion == "keep-probability above 0.5"
    few = Circuit.from_mask(trained.circuit.level, trained.circuit.scores > 0.8, trained.circuit.scores)
    assert TrainedCircuit("run", few).criterion == "those of the highest keep-probability (7 are above 0.5)"
