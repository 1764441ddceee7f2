"""More and more ablated together: every point is the circuit that it says, and rankings are read or refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oa_train.ablations.attribution import mask_gradients
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.circuits.circuit import Circuit
from oa_train.cli.main import main
from oa_train.engine.levels import masked_logits
from oa_train.engine.reading import read_values
from oa_train.errors import OaTrainError
from oa_train.metrics.measures import measured
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from oa_train.models.weights import fingerprint
from oa_train.studies.curve import Curve, CurveSettings
from tests.builders import small_ioi
from tests.known import known_case

FIT = RefitSettings(steps=3, batch_size=4, evaluate_every=3)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def task():
    return small_ioi(n_test=12, n_means=16, n_validation=8)


@pytest.fixture(scope="module")
def run(model, task) -> TrainedCircuit:
    """A circuit with keep-probabilities in no particular order."""
    level = Nodes.of(model.config)
    scores = torch.rand(len(level), generator=torch.Generator().manual_seed(5))
    circuit = Circuit.from_mask(level, scores > 0.5, scores, {"ablation": "optimal"})
    return TrainedCircuit("run", circuit, AblationSource(model, task, level).mean)


def write_csv(path: Path, scores: dict[str, float], header: str = "component,score") -> str:
    path.write_text("\n".join([header, *(f"{name},{score}" for name, score in scores.items())]))
    return str(path)


def test_every_point_is_the_model_without_the_least_important_units(model, task, run):
    kinds = ["mean", "resample"]
    settings = CurveSettings(rankings=["scores", "random"], random_orders=2, ablations=kinds, fractions=[0.2, 0.6])
    findings = Curve(model, task, [run], settings).run()
    level, batches, source = (
        run.circuit.level,
        list(task.batches("test", 12)),
        AblationSource(model, task, run.circuit.level),
    )
    assert len(findings.rows) == 3 * 2 * 4
    by_name = dict(zip(level.names, run.circuit.scores.tolist(), strict=True))
    ascending = sorted(by_name, key=by_name.__getitem__)
    for kind in kinds:
        for row in findings.where(ranking="scores", ablation=kind):
            assert row["kept"] + row["ablated"] == 15
            assert row["fraction"] == row["ablated"] / 15
            mask = level.mask(ascending[row["ablated"] :]).unsqueeze(0)
            wanted = circuit_behaviour(model, batches, level, mask, [ABLATION_KINDS[kind].prepare(source)])
            assert row["kl"].mean == pytest.approx(wanted.kl.mean().item(), rel=1e-4, abs=1e-6)
            assert row["accuracy"].mean == pytest.approx(wanted.accuracy.mean().item())
    assert {row["ablated"] for row in findings.rows} == {0, 3, 9, 15}
    first, second = (findings.where(draw=draw, ablation="mean", ablated=9)[0]["kl"].mean for draw in (1, 2))
    assert first != second


def test_the_ends_are_the_clean_model_and_everything_ablated(task):
    model = load_model(LMSpec()).double()
    settings = CurveSettings(rankings=["attribution", "random"], ablations=["zero", "counterfactual"], fractions=[0.5])
    findings = Curve(model, task, settings=settings).run()
    for row in findings.where(ablated=0):
        assert row["kl"].mean == 0
        assert row["accuracy"].mean == findings.metrics["clean_accuracy"].mean
        assert row["logit_difference_minus_clean"].mean == 0
    level = Nodes.of(model.config)
    kept = circuit_behaviour(
        model,
        task.batches("test", 12),
        level,
        torch.ones(1, 15, dtype=torch.bool),
        [AblationSource(model, task, level).zero],
    )
    assert kept.kl.abs().max() < 1e-12
    for kind in ("zero", "counterfactual"):
        ends = [row["kl"].mean for row in findings.where(ablated=15, ablation=kind)]
        assert len(set(ends)) == 1
        assert ends[0] > 1


def test_the_most_important_first_is_the_same_order_from_the_other_end(model, task, run):
    settings = CurveSettings(rankings=["scores"], ablations=["mean"], sizes=[4, 11], order="most")
    findings = Curve(model, task, [run], settings).run()
    level = run.circuit.level
    order = run.circuit.scores.argsort(descending=True)
    (row,) = findings.where(kept=11)
    mask = torch.ones(1, 15, dtype=torch.bool)
    mask[0, order[:4]] = False
    wanted = circuit_behaviour(model, task.batches("test", 12), level, mask, [AblationSource(model, task, level).mean])
    assert row["kl"].mean == pytest.approx(wanted.kl.mean().item(), rel=1e-4)


def test_constants_of_all_points_are_those_of_each_alone(model, task, run):
    settings = CurveSettings(rankings=["scores"], ablations=["optimal"], fractions=[0.4, 0.8], fit=FIT)
    refitted = Curve(model, task, [run], settings).run()
    level, source = run.circuit.level, AblationSource(model, task, run.circuit.level)
    ascending = run.circuit.scores.argsort().tolist()
    batches = list(task.batches("test", 12))
    for number in (6, 12, 15):
        mask = torch.ones(1, 15, dtype=torch.bool)
        mask[0, ascending[:number]] = False
        fitted = fit_constants(model, task, level, mask, [source.mean], FIT, others=[source.mean, source.zero])
        wanted = circuit_behaviour(model, batches, level, mask, fitted.sets).kl.mean().item()
        assert refitted.where(ablated=number)[0]["kl"].mean == pytest.approx(wanted, rel=1e-3)
    fixed = Curve(model, task, [run], replace(settings, refit=False)).run()
    means = Curve(model, task, [run], replace(settings, ablations=["mean"])).run()
    # This run's own constants are the means.
    assert [row["kl"] for row in fixed.rows] == [row["kl"] for row in means.rows]
    shared = Curve(model, task, settings=replace(settings, refit=False, rankings=["random"], random_orders=1)).run()
    assert len(shared.rows) == 4


def test_a_perfect_ranking_breaks_at_the_truth(tmp_path):
    case = known_case("two_hops")
    level = Nodes.of(case.model.config)
    true = {"a0.h0", "a1.h0", "a2.h0", "m3"}
    path = write_csv(tmp_path / "truth.csv", {name: float(name in true) for name in level.names})
    settings = CurveSettings(rankings=[path], ablations=["mean"], sizes=[4, 3, 2, 1])
    findings = Curve(case.model, case.task, settings=settings).run()
    until = findings.metrics["truth.csv_mean_holds_until"]
    assert until.mean == 12 / 16
    assert until.ci95 == (12 / 16, 12 / 16)
    (at_truth,), (beyond,) = findings.where(kept=4), findings.where(kept=3)
    assert at_truth["kl"].mean < 0.05
    assert beyond["kl"].mean > 1


@pytest.mark.parametrize("kind", [Nodes, Graph])
@pytest.mark.parametrize("loss", ["cross_entropy", "logit_difference"])
def test_attribution_is_the_finite_difference(task, kind, loss):
    model = load_model(LMSpec()).double()
    level = kind.of(model.config)
    batch = task.batch("validation", 0, 3)
    ablation = AblationSource(model, task, level).mean
    ablation = ablation.mapped(lambda table: table.double())
    gradients = mask_gradients(model, [batch], level, ablation, loss, rows_per_run=2)
    values = ablation.replacements(batch, lambda prompts: read_values(model, prompts, level))
    sign = -1 if loss == "logit_difference" else 1

    def losses(entry: int, step: float) -> torch.Tensor:
        mask = torch.ones(3, len(level), dtype=torch.float64)
        mask[:, entry] += step
        with torch.no_grad():
            logits = masked_logits(model, batch, level, mask, values)
        return sign * measured(loss, logits, logits, batch)

    for entry in (0, 4, len(level) // 2, len(level) - 1):
        step = 1e-5
        wanted = (losses(entry, step) - losses(entry, -step)) / (2 * step)
        torch.testing.assert_close(gradients[:, entry], wanted, rtol=1e-5, atol=1e-8)
    assert gradients.abs().max() > 1e-3


def test_a_run_of_edges_is_cut_edge_by_edge(model, task):
    graph = Graph.of(model.config)
    scores = torch.rand(len(graph), generator=torch.Generator().manual_seed(1))
    run = TrainedCircuit("edges", Circuit.from_mask(graph, scores > 0.5, scores, {"ablation": "resample"}))
    settings = CurveSettings(rankings=["scores", "attribution"], ablations=["mean"], fractions=[0.5])
    findings = Curve(model, task, [run], settings).run()
    (row,) = findings.where(ranking="scores", fraction=0.5)
    mask = (scores >= scores.sort(descending=True).values[len(graph) - row["ablated"] - 1]).unsqueeze(0)
    wanted = circuit_behaviour(model, task.batches("test", 12), graph, mask, [AblationSource(model, task, graph).mean])
    assert row["kl"].mean == pytest.approx(wanted.kl.mean().item(), rel=1e-4)


def scanned(tmp_path, model, **changes) -> str:
    """A scan's folder, written by hand."""
    names = Nodes.of(model.config).names
    rows = [
        {"component": name, "ablation": kind, "kl": {"mean": (number * 7 % 15) / 15 + (kind == "mean") * number}}
        for number, name in enumerate(names)
        for kind in ("mean", "optimal")
    ]
    results = {"command": "scan", "model": {"name": "tiny", "fingerprint": fingerprint(model)}, "rows": rows} | changes
    folder = tmp_path / "run" / "scan_0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_a_scan_ranks_by_its_optimal_ablation_or_another(model, task, tmp_path):
    folder = scanned(tmp_path, model)
    settings = CurveSettings(rankings=[folder], ablations=["zero"], fractions=[])
    names = Nodes.of(model.config).names
    by_optimal = Curve(model, task, settings=settings).run().facts["rankings"][0]
    assert by_optimal["name"] == "scan_0"
    assert by_optimal["ascending"] == [names[n] for n in sorted(range(15), key=lambda n: n * 7 % 15)]
    by_mean = Curve(model, task, settings=replace(settings, ranked_under="mean")).run().facts["rankings"][0]
    assert by_mean["ascending"] != by_optimal["ascending"]
    with pytest.raises(OaTrainError, match=r"has no zero ablation.*Valid names: mean, optimal"):
        Curve(model, task, settings=replace(settings, ranked_under="zero"))


def test_rankings_that_do_not_fit_are_refused(model, task, run, tmp_path):
    names = Nodes.of(model.config).names

    def refused(message: str, rankings: list[str], circuits=(), **settings) -> None:
        with pytest.raises(OaTrainError, match=message):
            Curve(model, task, circuits, CurveSettings(rankings=rankings, **settings))

    every, other_model = dict.fromkeys(names, 1.0), load_model(LMSpec()).double()
    with torch.no_grad():
        next(other_model.parameters()).mul_(1.01)
    refused(
        "a1.h9.*another model or selection.*Did you mean a1.h", [write_csv(tmp_path / "a", every | {"a1.h9": 1.0})]
    )
    few = {name: 1.0 for name in names if name not in ("m0", "a2.h1")}
    refused("no score for m0, a2.h1, of the 15 selected components", [write_csv(tmp_path / "b", few)])
    refused("columns name, score; expected component and score", [write_csv(tmp_path / "c", every, "name,score")])
    refused("gives m0 the score 'nan' in line", [write_csv(tmp_path / "d", every | {"m0": float("nan")})])
    (tmp_path / "e").write_text("component,score\nm0,1\nm0,2")
    refused("names m0 twice, the second time in line 3", [str(tmp_path / "e")])
    (tmp_path / "f").write_bytes(b"\xff\xfe\x00")
    refused("cannot be read as CSV", [str(tmp_path / "f")])
    refused("has no results.json", [str(tmp_path)])
    refused("results of 'compare'", [scanned(tmp_path, model, command="compare")])
    refused(r"was made with the model tiny .*Scan this model", [scanned(tmp_path, other_model)])
    refused("damaged", [scanned(tmp_path, model, rows=[{"component": "m0"}])])
    refused("ranks a0.h0, .* and 7 more, which this selection", [scanned(tmp_path, model)], sites=["mlp"])
    refused("Give --run", ["scores"])
    untrained = replace(run, circuit=Circuit(run.circuit.level, ("m0",)))
    refused("run was not trained", ["scores"], [untrained])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rankings": ["atribution"]}, "'atribution', which is not a path.*Did you mean attribution"),
        ({"rankings": []}, "rankings is empty"),
        ({"rankings": ["random", "random"]}, "twice"),
        ({"fractions": [0.5, 1.2]}, "fractions names 1.2"),
        ({"fractions": [float("nan")]}, "fractions names nan"),
        ({"sizes": [16]}, "sizes names 16; 15 parts are selected"),
        ({"components": ["a0", "!a0"]}, "selects no unit"),
        ({"components": "a9*"}, "a9"),
        ({"bound": -1.0}, "bound is -1.0"),
        ({"random_orders": 0}, "random_orders is 0"),
        ({"attribution_loss": "kl"}, "gradient is zero where everything is kept"),
        ({"ablations": ["optimum"]}, "Did you mean optimal"),
        ({"ranked_under": "means"}, "ranked_under is 'means'"),
        ({"ranked_under": "optimal"}, "no run whose constants"),
        ({"positions": 0}, "positions is 0"),
    ],
)
def test_bad_settings_are_told_before_any_work(model, task, settings, message):
    with pytest.raises(OaTrainError, match=message):
        Curve(model, task, settings=CurveSettings(**settings))


def test_on_the_command_line(run, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--data", "IOI", "--data.n_test", "8", "--data.n_means", "8", "--data.n_validation", "4"]
    command = [
        "curve",
        *few,
        "--curve.ablations",
        "[mean]",
        "--curve.fractions",
        "[0.5]",
        "--curve.random_orders",
        "1",
    ]
    assert main([*command, "--curve.components", "a*"]) == 0
    said = capsys.readouterr().out
    for words in ("the least important of 12 components", "attribution", "random", "holds until"):
        assert words in said
    folder = Path("runs/curve/version_0/studies/curve_0")
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["random_mean_kl_area"]["ci95"][0] <= results["metrics"]["random_mean_kl_area"]["mean"]
    assert (folder / "figures" / "curve.png").stat().st_size > 10_000
    assert (folder / "tables" / "curve.csv").exists()
    of_run = Path("runs/nodes/version_0")
    run.save_circuit(of_run)
    replace(run.constants, provenance={"bos_token_id": small_ioi().bos_token_id}).save(of_run / "constants")
    (of_run / "config.yaml").write_text("lm: {name: tiny}\ndata: IOI\n")
    assert main([*command, "--run", str(of_run)]) == 0
    ranked = json.loads((of_run / "studies/curve_0/results.json").read_text())["rankings"]
    assert [ranking["name"] for ranking in ranked] == ["scores", "attribution", "random"]
    assert main([*command, "--curve.rankings", "[scores]"]) == 2
    assert "Give --run" in capsys.readouterr().err
    assert main([*command, "--curve.fractions", "[2]"]) == 2
    assert not Path("runs/curve/version_1").exists()
