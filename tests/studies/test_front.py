"""The end of a fit of several circuits, and of one of edges."""

import csv
import json

import pytest
import torch

from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import AblationSource
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError
from oa_train.models.pruning import within_budget
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from oa_train.studies.compare import Compare, CompareSettings
from oa_train.studies.finish_circuits import FinishSettings, finish
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, small_ioi

QUICK = FinishSettings(refit=RefitSettings(steps=10, batch_size=4, evaluate_every=5))


@pytest.fixture(scope="module")
def task():
    return small_ioi()


def trained(task, **changes) -> CircuitModule:
    """Keep-probabilities that follow a random order, so that thresholds and budgets have something to choose."""
    module = CircuitModule(level="edges", **changes)
    quiet_trainer(max_steps=1).fit(module, datamodule=TaskData(task))
    module.masks.distribution.logits.data.normal_(-0.8, 1.0, generator=torch.Generator().manual_seed(0))
    return module


def finished(module, task, run, settings=QUICK):
    """Finish what a module has trained."""
    return finish(module.frozen, task, module.trained_circuits(settings.size), run, settings)


def test_a_circuit_of_edges_is_finished(task, tmp_path):
    module, run = trained(task), tmp_path / "experiment" / "version_0"
    findings = finished(module, task, run).findings
    circuit, constants = Circuit.load(run / "circuit"), Constants.load(run / "constants")
    assert torch.equal(circuit.mask, module.masks.discrete()[0])
    results = json.loads((findings.folder / "results.json").read_text())
    counts = results["circuit"]
    assert counts == circuit.counts()
    assert counts["edges"] < counts["edges_before_removal"] == int(module.masks.above_threshold().sum()) < 262
    assert [row["edge"] for row in results["rows"]] == list(circuit.names)
    batches, masks = task.batches("test", task.n_test), circuit.mask.unsqueeze(0)
    again = circuit_behaviour(module.frozen, batches, module.level, masks, [constants])
    assert results["metrics"]["kl"]["mean"] == pytest.approx(float(again.kl.mean()), rel=1e-5)
    assert {path.name for path in (findings.folder / "figures").iterdir()} == {"circuit.png", "keep_probability.png"}
    # Its own constants replace the embedding too.
    start = AblationSource(module.frozen, task, module.level).mean
    assert not torch.equal(constants.tables[Site("embedding")], start.tables[Site("embedding")])


def test_a_size_takes_the_highest_edges(task, tmp_path):
    module = trained(task)
    settings = FinishSettings(refit=QUICK.refit, size=40)
    (trained_circuit,) = finished(module, task, tmp_path / "e" / "version_0", settings).circuits
    assert len(trained_circuit.circuit) == 40
    assert torch.equal(
        trained_circuit.circuit.mask, within_budget(module.level, module.masks.keep_probability()[0], 40)
    )
    with pytest.raises(
        ConfigurationError, match="A circuit of 300 parts was asked for; this model has 262, of which 0"
    ):
        module.circuit(size=300)
    with pytest.raises(ConfigurationError, match=r"finish\.size is 0"):
        FinishSettings(size=0)


@pytest.mark.parametrize("ablation", ["optimal", "mean", "resample"])
def test_a_front_has_a_finished_run_for_each_circuit(task, tmp_path, ablation):
    module, run = (
        trained(task, penalty_weight=[0.01, 0.1, 0.02], ablation=ablation),
        tmp_path / "experiment" / "version_0",
    )
    front = finished(module, task, run)
    findings = front.findings
    masks = module.masks.discrete()
    for number, trained_circuit in enumerate(front.circuits):
        loaded = TrainedCircuit.load(run / "front" / str(number))
        assert loaded.circuit == trained_circuit.circuit
        assert torch.equal(loaded.circuit.mask, masks[number])
        assert (loaded.constants is None) == (ablation == "resample")
        if ablation != "resample":
            ablations = [loaded.constants]
            batches = task.batches("test", task.n_test)
            again = circuit_behaviour(module.frozen, batches, module.level, masks[number : number + 1], ablations)
            (row,) = findings.where(number=number, ablation=ablation)
            assert row["kl"].mean == pytest.approx(float(again.kl.mean()), rel=1e-4)
    results = json.loads((findings.folder / "results.json").read_text())
    assert [row["penalty_weight"] for row in results["rows"] if row["ablation"] == "zero"] == [0.01, 0.1, 0.02]
    assert {row["ablation"] for row in results["rows"]} == {ablation, "mean", "zero"}
    table = list(csv.DictReader((findings.folder / "tables" / "front.csv").read_text().splitlines()))
    assert [int(row["edges"]) for row in table if row["ablation"] == ablation] == [
        len(trained_circuit.circuit) for trained_circuit in front.circuits
    ]
    assert (findings.folder / "figures" / "front.png").is_file()


def test_circuits_refitted_side_by_side_are_those_refitted_alone(task, tmp_path):
    module = trained(task, penalty_weight=[0.01, 0.1])
    both = finished(module, task, tmp_path / "both")
    alone = finish(module.frozen, task, module.trained_circuits()[:1], tmp_path / "alone", QUICK)
    for site, table in alone.circuits[0].constants.tables.items():
        torch.testing.assert_close(both.circuits[0].constants.tables[site], table, rtol=1e-4, atol=1e-5)


def test_circuits_of_edges_are_compared_under_every_ablation(task, tmp_path):
    module = trained(task)
    end = finished(module, task, tmp_path / "e" / "version_0")
    run = TrainedCircuit("e/version_0", end.circuits[0].circuit, end.circuits[0].constants)
    settings = CompareSettings(
        ablations=["optimal", "mean", "counterfactual"], components=["m*"], fit=QUICK.refit, random_circuits=3
    )
    compared = Compare(module.frozen, task, [run], settings).run_in(tmp_path / "e" / "version_0")
    # Components are ablated alone beside it, and not every edge.
    assert [(row["component"], row["ablation"]) for row in compared.rows] == [
        (name, kind) for name in ("circuit", "m0", "m1", "m2") for kind in ("optimal", "mean", "counterfactual")
    ]
    assert compared.rows[0]["kl"].mean == pytest.approx(end.findings.metrics["kl"].mean, rel=1e-4)
    assert [len(drawn["kl"]) for drawn in compared.facts["random_circuits"]] == [3]
    results = json.loads((compared.folder / "results.json").read_text())
    assert results["runs"][0]["edges"] == list(run.circuit.names)
    nodes = TrainedCircuit("nodes", Circuit.from_patterns(Nodes.of(module.frozen.config), ["m*"]), None)
    with pytest.raises(ConfigurationError, match="different kinds: e/version_0 of 262 edges, nodes of 15 comp"):
        Compare(module.frozen, task, [run, nodes], settings)
