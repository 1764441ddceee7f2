"""From a trained module to artefacts, results and figures, on the built-in model."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from oa_train.ablations.constants import Constants
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ArtefactError
from oa_train.studies.compare import CompareSettings, compare
from oa_train.studies.finish import FinishSettings, finish
from oa_train.training.circuits import CircuitModule
from oa_train.training.data import TaskData
from oa_train.training.refit import RefitSettings
from tests.builders import quiet_trainer, small_ioi

QUICK = RefitSettings(steps=60, batch_size=8, evaluate_every=20)
KEPT = ("a0.h0", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3")


@pytest.fixture(scope="module")
def task():
    return small_ioi(n_validation=128, n_test=256, n_means=64)


@pytest.fixture(scope="module")
def module(task):
    module = CircuitModule()
    quiet_trainer(max_steps=1).fit(module, datamodule=TaskData(task))
    module.masks.logits.data.copy_(torch.where(module.components.mask(KEPT), 3.0, -3.0))
    return module


@pytest.fixture(scope="module")
def run(module, task, tmp_path_factory):
    run = tmp_path_factory.mktemp("experiment") / "version_0"
    finish(module, task, run, FinishSettings(refit=QUICK))
    return run


@pytest.fixture(scope="module")
def compared(module, task, run):
    circuit, constants = Circuit.load(run / "circuit"), Constants.load(run / "constants")
    settings = CompareSettings(fit=QUICK, random_circuits=3)
    return compare(module.frozen, task, circuit, constants, run, settings)


def test_finish_writes_what_it_found(module, run):
    circuit = Circuit.load(run / "circuit")
    assert circuit.nodes == KEPT
    torch.testing.assert_close(circuit.scores, module.keep_probability())
    constants = Constants.load(run / "constants")
    assert constants.bos_token_id == module.bos_token_id
    assert constants.provenance["fingerprint"] == module.fingerprint
    results = json.loads((run / "studies" / "fit_0" / "results.json").read_text())
    assert results["schema_version"] == 1
    assert results["command"] == "fit"
    assert results["circuit"] == {"nodes": 7, "nodes_total": 15}
    assert results["task"] | {"name": "ioi", "n_prompts": 256, "split": "test"} == results["task"]
    assert results["model"]["name"] == "tiny"
    assert results["metrics"]["kl"]["n"] == 256
    low, high = results["metrics"]["kl"]["ci95"]
    assert low < results["metrics"]["kl"]["mean"] < high
    assert len(results["rows"]) == 15
    assert {path.name for path in (run / "studies" / "fit_0" / "figures").iterdir()} == {
        "circuit.png",
        "keep_probability.png",
    }


def test_results_are_never_overwritten(module, task, run):
    before = (run / "circuit" / "artefact.json").read_bytes()
    with pytest.raises(ArtefactError, match="never overwritten"):
        finish(module, task, run, FinishSettings(refit=QUICK))
    assert (run / "circuit" / "artefact.json").read_bytes() == before


def test_refit_starts_are_honoured(module, task, tmp_path):
    found = {}
    for start in ("trained", "mean", "both"):
        settings = FinishSettings(refit=RefitSettings(steps=0), refit_start=start)
        found[start] = finish(module, task, tmp_path / start, settings)
    assert found["both"].metrics["kl"].mean in (found["trained"].metrics["kl"].mean, found["mean"].metrics["kl"].mean)


def test_compare_has_a_row_for_the_circuit_and_each_component_under_each_ablation(compared, module):
    rows = json.loads((compared.folder / "results.json").read_text())["rows"]
    expected = [(name, kind) for name in ("circuit", *module.components.names) for kind in ("optimal", "mean", "zero")]
    assert [(row["component"], row["ablation"]) for row in rows] == expected
    with (compared.folder / "tables" / "comparison.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["kl"]) for row in table] == [row["kl"]["mean"] for row in rows]
    assert (compared.folder / "figures" / "comparison.png").stat().st_size > 10_000


def test_differences_are_paired(compared):
    by_name = {(row.component, row.ablation): row for row in compared.rows}
    for row in compared.rows:
        optimal = by_name[row.component, "optimal"]
        difference = row.difference_to_optimal["kl"]
        assert difference.mean == pytest.approx(row.figures["kl"].mean - optimal.figures["kl"].mean, abs=1e-9)
        if row.ablation == "optimal":
            assert difference.stderr == 0
    mean = by_name["circuit", "mean"]
    optimal = by_name["circuit", "optimal"]
    # Prompts that are hard under one ablation are hard under the other, so pairing narrows the interval.
    assert (
        mean.difference_to_optimal["kl"].stderr
        < (mean.figures["kl"].stderr ** 2 + optimal.figures["kl"].stderr ** 2) ** 0.5
    )


def test_optimal_is_at_most_mean_and_zero_for_every_component(compared):
    # The strict law, on the upper bound of the interval, needs more prompts: tests/test_demo.py.
    for row in compared.rows:
        if row.ablation != "optimal":
            excess = -row.difference_to_optimal["kl"].mean
            assert excess <= max(1e-4, 0.03 * row.figures["kl"].mean), (row.component, row.ablation)


def test_random_circuits_are_worse(compared):
    circuit = next(row for row in compared.rows if row.component == "circuit" and row.ablation == "optimal")
    assert len(compared.random_kl) == 3
    assert sorted(compared.random_kl)[1] > 5 * circuit.figures["kl"].mean


def test_a_second_comparison_gets_a_folder_of_its_own(compared, module, task, run):
    circuit, constants = Circuit.load(run / "circuit"), Constants.load(run / "constants")
    settings = CompareSettings(fit=RefitSettings(steps=0), random_circuits=0)
    again = compare(module.frozen, task, circuit, constants, run, settings)
    assert again.folder.name == "compare_1"
    assert compared.folder.name == "compare_0"


def test_a_run_without_learned_constants_gets_some_for_its_circuit(compared, module, task, run, tmp_path):
    circuit, constants = Circuit.load(run / "circuit"), Constants.load(run / "constants")
    unlearned = replace(constants, heads=0 * constants.heads, provenance={"ablation": "zero"})
    settings = CompareSettings(fit=QUICK, random_circuits=0)
    rows = compare(module.frozen, task, circuit, unlearned, tmp_path, settings).rows[:3]
    kl = {row.ablation: row.figures["kl"].mean for row in rows}
    assert kl["optimal"] < 0.5 * min(kl["mean"], kl["zero"])


def test_a_circuit_written_by_hand_is_compared_at_positions(module, task, tmp_path):
    circuit = Circuit.from_patterns(module.components, ["a0*", "a1*", "m0"])
    constants = Constants.zeros(module.dimensions, module.bos_token_id, 4)
    settings = CompareSettings(fit=RefitSettings(steps=0), random_circuits=0)
    compared = compare(module.frozen, task, circuit, constants, tmp_path, settings)
    results = json.loads((compared.folder / "results.json").read_text())
    assert results["model"]["fingerprint"] == module.fingerprint
    assert results["task"]["name"] == "ioi"
