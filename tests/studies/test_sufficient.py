"""The minimal sufficient set: the truth on models of known circuits, laws and a slow reference on the built-in one."""

import itertools
import json
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import AblationSource
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.circuits.circuit import Circuit
from oa_train.cli.main import main
from oa_train.errors import ConfigurationError, OaTrainError
from oa_train.metrics.estimates import ratio_of_means
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from oa_train.studies.compare import Compare, CompareSettings
from oa_train.studies.sufficient import Sufficient, SufficientSettings
from tests.builders import small_ioi
from tests.known import known_case
from tests.test_progress import Told

QUICK = RefitSettings(steps=4, batch_size=4, evaluate_every=2)
MEANS = SufficientSettings(ablation="mean", search_prompts=8, recovery=0.8)


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def precise():
    return load_model(LMSpec()).double()


@pytest.fixture(scope="module")
def task():
    return small_ioi(n_validation=8, n_test=8, n_means=8)


def smallest_sets(case, level, ablation, most):
    """All smallest sets of at most so many units that keep nine tenths, by trying all sets."""
    batches = list(case.task.batches("validation", 8))
    nothing = torch.zeros(1, len(level), dtype=torch.bool)
    whole = circuit_behaviour(case.model, batches, level, nothing, [ablation]).kl.mean()
    for size in range(1, most + 1):
        sets = list(itertools.combinations(range(len(level)), size))
        masks = nothing.repeat(len(sets), 1)
        for row, units in enumerate(sets):
            masks[row, list(units)] = True
        kl = circuit_behaviour(case.model, batches, level, masks, [ablation], rows_per_run=512).kl.mean(dim=1)
        if (kl <= 0.1 * whole).any():
            return [level.kept(mask) for mask in masks[kl <= 0.1 * whole]]
    return []


@pytest.mark.long
@pytest.mark.parametrize("name", ["case_induction", "two_hops", "digit_sum", "pair_induction"])
def test_no_smaller_set_of_a_known_model_is_enough(name):
    case = known_case(name)
    level = Nodes.of(case.model.config)
    true = level.kept(level.mask(sorted({edge.split("->")[0] for edge in case.known.edges} - {"input"})))
    mean = AblationSource(case.model, case.task, level).mean
    assert smallest_sets(case, level, mean, len(true)) == [true]


@pytest.mark.parametrize("direction", ["restore", "remove"])
@pytest.mark.parametrize("kind", ["mean", "resample"])
@pytest.mark.parametrize("name", ["case_induction", "two_hops", "digit_sum", "pair_induction"])
def test_the_set_of_a_known_model_is_its_circuit(name, kind, direction):
    case = known_case(name)
    few = copy(case.task)
    few.n_means, few.n_validation, few.n_test = 64, 12, 6
    settings = SufficientSettings(direction=direction, ablation=kind, search_prompts=12, curve_points=2)
    findings = Sufficient(case.model, few, settings=settings).run()
    assert set(findings.facts["names"]) == {edge.split("->")[0] for edge in case.known.edges} - {"input"}
    assert findings.rows[-1]["recovery"].mean > 0.99
    moves = findings.facts["search"]["moves"]
    assert ("remove" in moves) if direction == "remove" else moves.keys() & {"restore pair", "restore group"}


@pytest.mark.parametrize("measure", ["kl", "logit_difference", "accuracy"])
def test_all_kept_recovers_everything_and_nothing_kept_nothing(precise, task, measure):
    for direction, size, recovered in (("restore", 0, 0), ("remove", 15, 1)):
        settings = replace(MEANS, direction=direction, measure=measure, recovery=1.0, pairs=0)
        row = Sufficient(precise, task, settings=settings).run().rows[0]
        assert row["size"] == size
        assert row["recovery"].mean == pytest.approx(recovered, abs=1e-12)
        assert row["validation_recovery"] == pytest.approx(recovered, abs=2e-6)


def test_the_last_point_is_what_compare_finds(precise, task):
    findings = Sufficient(precise, task, settings=replace(MEANS, direction="remove")).run()
    settings = CompareSettings(ablations=["mean"], components=[], random_circuits=0)
    (row,) = Compare(precise, task, [findings.trained], settings).run().rows
    for measure in ("kl", "accuracy", "logit_difference", "cross_entropy"):
        assert findings.metrics[measure].mean == pytest.approx(row[measure].mean, abs=1e-12)
    nothing = findings.metrics["nothing_kl"].mean
    assert findings.metrics["recovery"].mean == pytest.approx(1 - row["kl"].mean / nothing, abs=1e-12)
    assert row["kl"].mean > 1e-3


def test_it_is_the_obvious_loop(precise, task):
    level = Nodes.of(precise.config)
    mean, batches = AblationSource(precise, task, level).mean, list(task.batches("validation", 8))

    def kl(names):
        return circuit_behaviour(precise, batches, level, level.mask(names)[None], [mean]).kl.mean().item()

    kept, most = list(level.names), 0.2 * kl([])
    while True:
        costs = {name: kl([other for other in kept if other != name]) for name in kept}
        name = min(costs, key=lambda name: costs[name])
        if costs[name] > most:
            break
        kept.remove(name)
    settings = replace(MEANS, direction="remove", pairs=0)
    findings = Sufficient(precise, task, settings=settings).run()
    assert findings.facts["names"] == kept
    assert 0 < len(kept) < 15


def test_the_interval_of_a_ratio():
    generator = torch.Generator().manual_seed(0)
    below = 1 + torch.rand(4000, generator=generator, dtype=torch.float64)
    above = 0.7 * below + 0.1 * torch.randn(4000, generator=generator, dtype=torch.float64)
    whole = ratio_of_means(above, below)
    assert whole.mean == pytest.approx((above.mean() / below.mean()).item())
    parts = torch.stack([(a.mean() / b.mean()) for a, b in zip(above.split(40), below.split(40), strict=True)])
    assert whole.stderr == pytest.approx(parts.std().item() / 10, rel=0.2)
    assert ratio_of_means(below, below).ci95 == pytest.approx((1, 1))
    twice = ratio_of_means(above.repeat(2), below.repeat(2), torch.arange(4000).repeat(2))
    assert (twice.n, twice.stderr) == (4000, pytest.approx(whole.stderr))


def a_run(model, task, names, ablation="mean"):
    level = Nodes.of(model.config)
    scores = torch.where(level.mask(names), 0.9, 0.1)
    return TrainedCircuit(
        "run",
        Circuit(level, tuple(names), scores, {"ablation": ablation}),
        AblationSource(model, task, level).mean,
    )


def test_a_run_s_circuit_is_the_start_and_its_constants_are_used(model, task):
    run = a_run(model, task, ("a0.h0", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3"))
    settings = replace(MEANS, direction="remove", ablation=None, recovery=0.5, candidates=3)
    findings = Sufficient(model, task, [run], settings).run()
    assert findings.facts["ablation"] == "mean"
    assert findings.rows[0]["size"] == 7
    behaviour = circuit_behaviour(
        model, task.batches("test", 8), run.circuit.level, run.circuit.mask[None], [run.constants]
    )
    assert findings.rows[0]["kl"].mean == pytest.approx(behaviour.kl.mean().item(), rel=1e-5)
    restored = Sufficient(model, task, [run], replace(settings, direction="restore")).run()
    assert set(restored.rows[1]["restored"].split()) <= set(run.circuit.names)
    assert restored.rows[1]["screened"]


def test_under_optimal_ablation_the_set_gets_constants_of_its_own(model, task, tmp_path):
    settings = replace(MEANS, ablation=None, direction="remove", fit=QUICK, fit_every=4, curve_points=6)
    study, told = Sufficient(model, task, settings=settings), Told()
    study.track = told
    findings = study.write(study.answer(), study.claim(tmp_path))
    assert all(done <= passes for _, passes, done in told.stages_told)
    assert sum(stage.passes for stage in study.plan()) >= sum(done for *_, done in told.stages_told)
    last = findings.rows[-1]
    assert last["trained_kl"].mean <= last["kl"].mean * 1.2
    assert 1 < len([row for row in findings.rows if "trained_kl" in row]) < len(findings.rows)
    stored = TrainedCircuit.load(findings.folder)
    assert stored.circuit == findings.trained.circuit
    behaviour = circuit_behaviour(
        model, task.batches("test", 8), stored.circuit.level, stored.circuit.mask[None], [stored.constants]
    )
    assert behaviour.kl.mean().item() == pytest.approx(last["trained_kl"].mean, rel=1e-4, abs=1e-7)
    assert (findings.folder / "figures" / "recovery.png").stat().st_size > 10_000


def test_only_selected_units_are_moved(model, task):
    findings = Sufficient(model, task, settings=replace(MEANS, components=["a1*"], direction="remove")).run()
    assert set(findings.facts["names"]) <= {f"a1.h{head}" for head in range(4)}
    assert findings.facts["n_units"] == 4
    assert len(findings.trained.circuit) == len(findings.facts["names"]) + 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recovery": 0.0}, "recovery is 0.0; expected a share above 0"),
        ({"recovery": 1.1}, "recovery is 1.1"),
        ({"recovery": float("nan")}, "recovery is nan"),
        ({"ablation": "mena"}, "Did you mean mean"),
        ({"ablation": "clean"}, "restores the model's own values"),
        ({"components": []}, "selects no unit"),
        ({"components": ["a1*", "!a1*"]}, "selects no unit"),
        ({"components": ["a9*"]}, "a9"),
        ({"sites": ["neuron"]}, "Did you mean neurons"),
        ({"candidates": 0}, "candidates is 0"),
        ({"at_once": 0}, "at_once is 0"),
        ({"pairs": -1}, "pairs is -1"),
        ({"least_gain": 1.0}, "least_gain is 1.0"),
        ({"search_prompts": 1}, "search_prompts is 1"),
        ({"curve_points": 1}, "curve_points is 1"),
    ],
)
def test_bad_settings_are_told(model, task, options, message):
    with pytest.raises(OaTrainError, match=message):
        Sufficient(model, task, settings=SufficientSettings(**options))


def test_what_has_no_answer_is_refused(model, task):
    edges = TrainedCircuit("edges", Circuit(Graph.of(model.config), ("input->m0",)))
    with pytest.raises(ConfigurationError, match=r"circuit of edges, and sufficient moves single units"):
        Sufficient(model, task, [edges])
    run = a_run(model, task, ("m0",))
    with pytest.raises(ConfigurationError, match="but the circuit of run has heads, mlp"):
        Sufficient(model, task, [run], SufficientSettings(sites=["attention"]))
    by_position = replace(run, constants=run.constants.with_positions(3))
    with pytest.raises(ConfigurationError, match="tell 3 positions apart"):
        Sufficient(model, task, [by_position], SufficientSettings(positions=2))
    with pytest.raises(ConfigurationError, match="one circuit or none"):
        Sufficient(model, task, [run, run])
    useless = replace(MEANS, components="a2.h1", measure="accuracy")
    with pytest.raises(ConfigurationError, match="there is nothing to recover"):
        Sufficient(model, task, settings=useless).run()


FEW = ["--data.n_test", "8", "--data.n_validation", "8", "--data.n_means", "8"]


def test_on_the_command_line_and_the_set_is_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--sufficient.ablation", "mean", "--sufficient.recovery", "0.7", "--device", "cpu"]
    assert main(["sufficient", "--data", "IOI", *FEW, *words]) == 0
    said = capsys.readouterr()
    assert "units, which recover 0.7 in KL divergence" in said.out
    assert "the search may move 15 units and tries 15 a round on 8 prompts" in said.err
    study = Path("runs/sufficient/version_0/studies/sufficient_0")
    results = json.loads((study / "results.json").read_text())
    assert results["circuit"]["nodes"] == len(results["names"])
    random = ["--compare.random_circuits", "0", "--compare.components", "[]", "--compare.ablations", "[mean]"]
    assert main(["compare", "--run", str(study), *FEW, *random, "--device", "cpu"]) == 0
    compared = json.loads((study / "studies" / "compare_0" / "results.json").read_text())
    assert compared["rows"][0]["run"] == "sufficient/version_0/studies/sufficient_0"
    assert compared["rows"][0]["kl"]["mean"] == pytest.approx(results["metrics"]["kl"]["mean"], rel=1e-5)
    capsys.readouterr()
    # The run of a study has a model and a task, and no circuit.
    assert main(["sufficient", "--run", "runs/sufficient/version_0", *words]) == 0
    for wrong, told in (
        (["--run", "nowhere"], "does not exist"),
        (["--data", "IOI", "--sufficient.direction", "removed"], "direction"),
        (["--data", "IOI", "--sufficient.measure", "acuracy"], "measure"),
    ):
        assert main(["sufficient", *wrong]) == 2
        assert told in capsys.readouterr().err


def test_a_run_of_another_model_is_refused(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, level = Path("runs/other/version_0"), Nodes.of(model.config)
    provenance = {"ablation": "resample", "model": "other", "fingerprint": "0123"}
    Circuit(level, ("m0",), provenance=provenance).save(run / "circuit")
    (run / "config.yaml").write_text("lm: {name: tiny}\ndata: IOI")
    assert main(["sufficient", "--run", str(run), *FEW, "--device", "cpu"]) == 2
    assert "The circuit belongs to other" in capsys.readouterr().err
    assert not (run / "studies").exists()
