"""The end of a fit with every kind of ablation and loss: what is refitted, what is written, what is measured."""

import json
from contextlib import contextmanager

import pytest
import torch

from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour, clean_behaviour
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ArtefactError
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES
from oa_train.models.sites import Site
from oa_train.progress import Track, silent
from oa_train.studies import finish_circuits as finishing
from oa_train.studies.finish_circuits import FinishSettings, finish
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, small_ioi

REFITTED = FinishSettings(refit=RefitSettings(steps=20, batch_size=8, evaluate_every=10))
QUICK = FinishSettings(refit=RefitSettings(steps=10, batch_size=4, evaluate_every=5))
KEPT = ("a0.h0", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3")


@pytest.fixture(scope="module")
def task():
    return small_ioi()


def trained(task, **changes) -> CircuitModule:
    module = CircuitModule(**changes)
    quiet_trainer(max_steps=1).fit(module, datamodule=TaskData(task))
    module.masks.distribution.logits.data.copy_(torch.where(module.level.mask(KEPT), 3.0, -3.0))
    return module


def finished(module, task, run, settings=None, track=silent):
    """Finish what a module has trained."""
    settings = settings or FinishSettings()
    return finish(module.frozen, task, module.trained_circuits(settings.size), run, settings, track)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    task = small_ioi(n_means=64)
    module = trained(task)
    run = tmp_path_factory.mktemp("experiment") / "version_0"
    finished(module, task, run, REFITTED)
    return module, task, run


def test_finish_writes_what_it_found(finished_run):
    module, task, run = finished_run
    circuit = Circuit.load(run / "circuit")
    assert circuit.nodes == KEPT
    torch.testing.assert_close(circuit.scores, module.masks.keep_probability()[0])
    constants = Constants.load(run / "constants")
    assert constants.provenance["bos_token_id"] == task.bos_token_id
    assert constants.provenance["fingerprint"] == module.fingerprint
    results = json.loads((run / "studies" / "fit_0" / "results.json").read_text())
    assert results["schema_version"] == 1
    assert results["command"] == "fit"
    assert results["circuit"] == {"nodes": 7, "nodes_total": 15}
    assert results["task"] | {"name": "ioi", "n_prompts": 32, "split": "test"} == results["task"]
    assert results["model"]["name"] == "tiny"
    assert results["metrics"]["kl"]["n"] == 32
    low, high = results["metrics"]["kl"]["ci95"]
    assert low < results["metrics"]["kl"]["mean"] < high
    assert len(results["rows"]) == 15
    assert results["penalty_weight"] == 0.05
    assert "target_size" not in results
    figures = {path.name for path in (run / "studies" / "fit_0" / "figures").iterdir()}
    assert figures == {"circuit.png", "keep_probability.png"}


def test_results_are_never_overwritten(finished_run):
    module, task, run = finished_run
    before = (run / "circuit" / "artefact.json").read_bytes()
    with pytest.raises(ArtefactError, match="never overwritten"):
        finished(module, task, run, QUICK)
    assert (run / "circuit" / "artefact.json").read_bytes() == before


def test_refit_starts_are_honoured(finished_run, tmp_path):
    module, task, _ = finished_run
    kl = {}
    for start in ("trained", "mean", "both"):
        settings = FinishSettings(refit=RefitSettings(steps=0), refit_start=start)
        kl[start] = finished(module, task, tmp_path / start, settings).findings.metrics["kl"].mean
    assert kl["both"] in (kl["trained"], kl["mean"])


@pytest.mark.parametrize("ablation", [name for name, kind in ABLATION_KINDS.items() if not kind.restores])
def test_a_fit_ends_with_its_own_ablation(task, tmp_path, ablation):
    kind, module = ABLATION_KINDS[ablation], trained(task, ablation=ablation)
    told = []

    class Told(Track):
        @contextmanager
        def __call__(self, passes, description):
            told.append(description)
            yield lambda done: None

    end = finished(module, task, tmp_path, QUICK, Told())
    own, metrics = end.circuits[0].constants, end.findings.metrics
    assert any("refitting the constants" in line for line in told) == kind.learned
    assert (tmp_path / "constants").exists() == kind.constant == (own is not None)
    circuit = Circuit.load(tmp_path / "circuit")
    assert circuit.nodes == KEPT
    assert circuit.provenance["ablation"] == ablation
    assert circuit.provenance["loss"] == "kl"
    if kind.constant:
        constants = Constants.load(tmp_path / "constants")
        assert constants.provenance == circuit.provenance
        head = Site("heads", 2)
        assert torch.equal(constants.tables[head], own.tables[head])
        before = module.replacements.ablations()[0].tables[head]
        assert torch.equal(constants.tables[head], before) != kind.learned
    document = json.loads((end.findings.folder / "results.json").read_text())
    assert document["ablation"] == ablation
    assert set(document["metrics"]) == {*MEASURES, *(f"clean_{name}" for name in MEASURES)}
    assert document["metrics"]["cross_entropy"]["n"] == task.n_test

    replacing = own or kind.prepare(AblationSource(module.frozen, task, module.level))
    batches = list(task.batches("test", task.n_test))
    expected = circuit_behaviour(module.frozen, batches, module.level, circuit.mask.unsqueeze(0), [replacing])
    clean = clean_behaviour(module.frozen, batches)
    for name in MEASURES:
        assert metrics[name].mean == pytest.approx(float(getattr(expected, name).mean()), rel=1e-5, abs=1e-6)
        whole = metrics[f"clean_{name}"].mean
        assert whole == pytest.approx(float(getattr(clean, name).mean()), rel=1e-5, abs=1e-6)
    assert metrics["clean_kl"].mean == 0
    assert metrics["kl"].mean > 1e-3


@pytest.mark.parametrize("loss", LOSS_SIGNS)
def test_the_refit_minimises_what_the_fit_minimised(task, tmp_path, loss, monkeypatch):
    module = trained(task, loss=loss)
    fitted, asked = finishing.fit_constants, []

    def recorded(*args, **options):
        asked.append(options["loss"])
        return fitted(*args, **options)

    monkeypatch.setattr(finishing, "fit_constants", recorded)
    end = finished(module, task, tmp_path, QUICK)
    (trained_circuit,) = end.circuits
    assert asked == [loss]
    masks = trained_circuit.circuit.mask.unsqueeze(0)
    validation = list(task.batches("validation", task.n_validation))
    before, after = (
        float(circuit_behaviour(module.frozen, validation, module.level, masks, [constants]).loss(loss).mean())
        for constants in (module.replacements.ablations()[0], trained_circuit.constants)
    )
    assert after < before
    assert Circuit.load(tmp_path / "circuit").provenance["loss"] == loss
