"""Every unit ablated alone: the table, its statistics, and that pieces add up whoever computes them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource
from oa_train.engine.direct_attribution import direct_attribution
from oa_train.errors import ArtefactError, OaTrainError
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.frozen import CausalLM
from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec
from oa_train.studies.scan import Scan, ScanSettings
from oa_train.studies.unit_study import UnitStudy
from oa_train.tasks import IOI
from tests.jobs.fits import torchrun

FIT = RefitSettings(steps=30, batch_size=8, evaluate_every=15)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def task() -> IOI:
    return IOI(n_test=48, n_means=64, n_validation=48)


@pytest.fixture(scope="module")
def whole(model, task):
    return Scan(model, task, settings=ScanSettings(fit=FIT)).run()


def test_each_unit_is_measured_as_it_is_alone(model, task, whole):
    scan = Scan(model, task)
    assert len(whole.rows) == 15 * 8
    batches, source = list(task.batches("test", 48)), AblationSource(model, task, scan.level)
    for name, kind in (("a1.h0", "mean"), ("m2", "zero"), ("a0.h3", "resample"), ("m1", "counterfactual")):
        mask = ~scan.level.mask([name]).unsqueeze(0)
        behaviour = circuit_behaviour(model, batches, scan.level, mask, [ABLATION_KINDS[kind].prepare(source)])
        (row,) = whole.where(component=name, ablation=kind)
        assert row["kl"].mean == pytest.approx(behaviour.kl.mean().item(), rel=1e-4, abs=1e-7)
        assert row["accuracy"].mean == pytest.approx(behaviour.accuracy.mean().item())


def test_each_unit_has_its_direct_attribution(model, task, whole):
    level = Scan(model, task).level
    terms = torch.cat([direct_attribution(model, batch, level) for batch in task.batches("test", 48)]).mean(dim=0)
    for name, term in zip(level.names, terms.tolist(), strict=True):
        for row in whole.where(component=name):
            assert row["direct_attribution"].mean == pytest.approx(term, rel=1e-5)
    residual = ScanSettings(sites=["residual"], ablations=["zero"])
    assert all("direct_attribution" not in row for row in Scan(model, task, settings=residual).run().rows)


def test_optimal_ablation_is_nowhere_worse(whole):
    for row in whole.rows:
        if row["ablation"] in ("mean", "zero"):
            _, high = row["kl_minus_optimal"].ci95
            assert high > -max(1e-4, 0.02 * row["kl"].mean)


def test_critical_units_and_agreement(whole):
    optimal = {row["component"]: row for row in whole.where(ablation="optimal")}
    assert optimal["a1.h0"]["critical"]
    assert not optimal["a2.h1"]["critical"]
    assert optimal["a2.h1"]["adjusted_p"] > optimal["a1.h0"]["adjusted_p"]
    (pair,) = (x for x in whole.facts["agreement"] if (x["first"], x["second"]) == ("optimal", "mean"))
    assert 0.7 < pair["rank_correlation"]["value"] <= 1
    assert pair["median_ratio"]["value"] < 1
    summary = whole.shown[1]
    assert len(summary.rows) == 8


def test_the_size_of_a_piece_changes_no_result(model, task, whole):
    other = Scan(model, task, settings=ScanSettings(fit=FIT, parts_at_once=4)).run()
    for first, second in zip(whole.rows, other.rows, strict=True):
        assert (first["component"], first["ablation"]) == (second["component"], second["ablation"])
        assert first["kl"].mean == pytest.approx(second["kl"].mean, rel=2e-2, abs=1e-5)


def test_an_interrupted_scan_goes_on_where_it_stopped(model, task, tmp_path, monkeypatch):
    settings = ScanSettings(fit=RefitSettings(steps=2, batch_size=4), components="a0* m*", parts_at_once=3)
    settings = ScanSettings(fit=settings.fit, components=["a0*", "m*"], parts_at_once=3)
    expected = Scan(model, task, settings=settings).run()
    stopped = Scan(model, task, settings=settings)
    measured, done = UnitStudy.measured, []

    def until_the_last(ablations: UnitStudy, masks: Any, described: str) -> Any:
        if described == "units 7 to 7":
            raise KeyboardInterrupt
        done.append(described)
        return measured(ablations, masks, described)

    with monkeypatch.context() as patched:
        patched.setattr(UnitStudy, "measured", until_the_last)
        with pytest.raises(KeyboardInterrupt):
            stopped.run_in(tmp_path)
    assert done == ["units 1 to 3", "units 4 to 6"]
    folder = tmp_path / "studies" / "scan_0"
    resumed = Scan(model, task, settings=settings)
    resumed.resume(folder)
    again = []
    monkeypatch.setattr(UnitStudy, "measured", lambda *asked: again.append(asked[2]) or measured(*asked))
    findings = resumed.write(resumed.answer(), folder)
    assert again == ["units 7 to 7"]
    assert findings.flat_rows() == expected.flat_rows()
    assert json.loads((folder / "results.json").read_text())["n_units"] == 7
    with pytest.raises(ArtefactError, match="this scan is finished"):
        Scan(model, task, settings=settings).resume(folder)


def test_pieces_of_another_question_are_refused(model, task, tmp_path):
    first = Scan(model, task, settings=ScanSettings(components="m0", ablations=["zero"]))
    folder = first.claim(tmp_path)
    first.answer()
    other = Scan(model, task, settings=ScanSettings(components="m1", ablations=["zero"]))
    other.resume(folder)
    with pytest.raises(ArtefactError, match="pieces of another study: settings, units differ"):
        other.answer()
    (folder / "pieces" / "0000.safetensors").write_bytes(b"damaged")
    again = Scan(model, task, settings=first.settings)
    again.resume(folder)
    with pytest.raises(ArtefactError, match=r"0000.safetensors cannot be read.*Delete it and resume"):
        again.answer()
    with pytest.raises(ArtefactError, match="not the folder of an unfinished scan"):
        again.resume(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": "a9*"}, "a9"),
        ({"sites": ["neuron"]}, "Did you mean neurons"),
        ({"sites": ["features"]}, "dictionaries"),
        ({"ablations": ["optimum"]}, "Did you mean optimal"),
        ({"ablations": []}, "ablations is empty"),
        ({"ablations": ["clean"]}, "restores the model's own values"),
        ({"parts_at_once": 0}, "parts_at_once is 0"),
        ({"positions": 0}, "positions is 0"),
        ({"threshold": -1.0}, "threshold is -1.0"),
        ({"false_discovery_rate": 1.0}, "false_discovery_rate is 1.0"),
        ({"components": "m0@S9"}, "S9"),
    ],
)
def test_bad_settings_are_told(model, task, settings, message):
    with pytest.raises(OaTrainError, match=message):
        Scan(model, task, settings=ScanSettings(**settings)).run()


@pytest.mark.parametrize("sites", [["neurons"], ["residual"], ["attention"], ["tokens"], ["features"]])
def test_other_kinds_of_site(model, task, sites):
    chosen = {"neurons": ["m0.n1", "m2.n127"], "residual": ["r1@S2", "r2@end"], "features": ["f2.1?"]}
    settings = ScanSettings(
        sites=sites,
        components=chosen.get(sites[0], "*"),
        dictionaries=[DictionarySpec("tiny_r2")] if sites == ["features"] else [],
        fit=RefitSettings(steps=1),
        ablations=["optimal", "zero"],
    )
    findings = Scan(model, task, settings=settings).run()
    assert all(draw() is not None for draw in findings.figures.values())
    assert all(row["kl"].mean >= 0 for row in findings.rows)


COMMAND = ["scan", "--data", "IOI", "--data.n_test", "16", "--data.n_means", "16", "--data.n_validation", "16"]
COMMAND += ["--scan.fit.steps", "2", "--scan.parts_at_once", "4", "--scan.ablations", "[optimal,mean,resample]"]


def rows_of(folder: Path) -> Any:
    return json.loads((folder / "runs" / "scan" / "version_0" / "studies" / "scan_0" / "results.json").read_text())[
        "rows"
    ]


def test_two_processes_write_the_table_of_one_and_a_killed_scan_resumes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, launcher in ((one, ["-m"]), (two, torchrun(2))):
        folder.mkdir()
        subprocess.run([sys.executable, *launcher, "oa_train.cli.main", *COMMAND], cwd=folder, check=True)
    assert rows_of(one) == rows_of(two)
    study = one / "runs" / "scan" / "version_0" / "studies" / "scan_0"
    (study / "results.json").unlink()
    (study / "pieces" / "0002.safetensors").unlink()
    resumed = [sys.executable, "-m", "oa_train.cli.main", *COMMAND, "--resume", str(study)]
    subprocess.run(resumed, cwd=one, check=True)
    assert rows_of(one) == rows_of(two)


def test_a_scan_that_is_interrupted_says_how_it_goes_on(tmp_path):
    slow = [*COMMAND, "--scan.fit.steps", "20000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "oa_train.cli.main", *slow], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline, study = time.monotonic() + 60, tmp_path / "runs" / "scan" / "version_0" / "studies" / "scan_0"
    while not (study / "pieces" / "about.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "--resume runs/scan/version_0/studies/scan_0" in told
    assert (study / "pieces" / "about.json").exists()
