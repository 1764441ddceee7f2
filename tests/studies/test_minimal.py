"""Minimality and completeness on the built-in model, against running the model by hand."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax

from oa_train.ablations.base import Ablation
from oa_train.ablations.context import ablated
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.circuits.circuit import Circuit
from oa_train.circuits.random import random_circuits
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.engine.reading import read_values
from oa_train.errors import ConfigurationError
from oa_train.metrics.estimates import Estimate, paired_difference
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from oa_train.studies.minimal import Minimal, MinimalSettings, verdict
from tests.builders import small_ioi

KEPT = ("a0.h0", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3")
# A head that is read by the logits, and an MLP that nobody reads.
EDGES = ("input->a0.h0<q>", "input->a0.h0<v>", "a0.h0->logits", "input->logits", "input->m1", "a0.h0->m1")
QUICK = RefitSettings(steps=6, batch_size=4, evaluate_every=3)
UNFITTED = MinimalSettings(random_complements=0, fit=RefitSettings(steps=0))


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def task():
    return small_ioi()


@pytest.fixture(scope="module")
def source(model, task):
    """Means of all sources, those of a graph, which are those of nodes too."""
    return AblationSource(model, task, Graph.of(model.config))


def by_hand(model, source, names=KEPT, ablation="mean", **provenance) -> TrainedCircuit:
    """A circuit of components or of edges, with means as its constants."""
    of_edges = any("->" in name for name in names)
    level = Graph.of(model.config) if of_edges else Nodes.of(model.config)
    circuit = Circuit(level, names, provenance={"ablation": ablation} | provenance)
    # As a run has them, whose constants name the token that is never ablated.
    constants = replace(source.mean, provenance={"bos_token_id": source.task.bos_token_id})
    return TrainedCircuit("by hand", circuit, constants if ABLATION_KINDS[ablation].constant else None)


@pytest.fixture(scope="module")
def of_nodes(model, task, source, tmp_path_factory):
    run = by_hand(model, source)
    settings = MinimalSettings(random_complements=3)
    return run, minimal(model, task, run, tmp_path_factory.mktemp("nodes"), settings)


@pytest.fixture(scope="module")
def of_edges(model, task, source, tmp_path_factory):
    run = by_hand(model, source, EDGES)
    return run, minimal(model, task, run, tmp_path_factory.mktemp("edges"), UNFITTED)


def minimal(model, task, run, folder, settings=None):
    """Ask, and write the answer into a run folder."""
    return Minimal(model, task, [run], settings).run_in(folder)


def complements(findings):
    """Measures of the model without the circuit, and without each random one."""
    own = {"kl": findings.metrics["complement_kl"]}
    return [own, *findings.facts["random_complements"]]


def named(row):
    """Name of the part that a row is about."""
    return row.get("component") or row["edge"]


def divergence(clean: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL divergence of each prompt, written out."""
    first, second = log_softmax(clean.double(), dim=-1), log_softmax(logits.double(), dim=-1)
    return (first.exp() * (first - second)).sum(dim=-1)[:, 0]


def node_kl(model, task, names, constants) -> torch.Tensor:
    """The same of a circuit of components, by a model that runs as this circuit."""
    (batch,) = task.batches("test", task.n_test)
    clean = scored_logits(model, batch)
    circuit = Circuit(Nodes.of(model.config), tuple(names))
    constants = replace(constants, provenance={"bos_token_id": task.bos_token_id})
    with ablated(model, circuit, constants), torch.no_grad():
        return divergence(clean, scored_logits(model, batch))


def edge_kl(model, task, names, ablation: Ablation) -> torch.Tensor:
    """The same of a circuit of edges."""
    (batch,) = task.batches("test", task.n_test)
    clean = scored_logits(model, batch)
    graph = Graph.of(model.config)
    mask = graph.mask(names).float().expand(len(batch), -1)
    replacements = ablation.replacements(batch, lambda prompts: read_values(model, prompts, graph))
    with torch.no_grad():
        return divergence(clean, masked_logits(model, batch, graph, mask, replacements))


def test_each_component_is_worth_what_the_circuit_loses_without_it(model, task, source, of_nodes):
    _, findings = of_nodes
    whole = node_kl(model, task, KEPT, source.mean)
    assert findings.metrics["circuit_kl"].mean == pytest.approx(whole.mean().item(), rel=1e-4)
    assert {named(row) for row in findings.rows} == set(KEPT)
    for row in findings.rows:
        without = node_kl(model, task, [name for name in KEPT if name != named(row)], source.mean)
        wanted = paired_difference(without, whole)
        assert row["kl_minus_circuit"].mean == pytest.approx(wanted.mean, abs=1e-5)
        assert row["kl_minus_circuit"].stderr == pytest.approx(wanted.stderr, abs=1e-5)
        assert row["kl"].mean == pytest.approx(without.mean().item(), abs=1e-5)
        assert row["dangling"] == 0
    increases = [row["kl_minus_circuit"].mean for row in findings.rows]
    assert increases == sorted(increases, reverse=True)


def test_each_edge_takes_with_it_what_then_dangles(model, task, source, of_edges):
    _, findings = of_edges
    alive = EDGES[:4]
    # Nothing reads m1, so its edges are worth nothing; without its only way out the head goes altogether.
    left = {name: [one for one in alive if one != name] for name in EDGES}
    left["a0.h0->logits"] = ["input->logits"]
    whole = edge_kl(model, task, alive, source.mean)
    assert findings.metrics["circuit_kl"].mean == pytest.approx(whole.mean().item(), rel=1e-4)
    for row in findings.rows:
        name = named(row)
        wanted = paired_difference(edge_kl(model, task, left[name], source.mean), whole)
        assert row["kl_minus_circuit"].mean == pytest.approx(wanted.mean, abs=1e-5)
        assert row["kl_minus_circuit"].stderr == pytest.approx(wanted.stderr, abs=1e-5)
        assert row["dangling"] == (2 if name == "a0.h0->logits" else 0)


def test_what_is_superfluous_is_taken_out_together_as_well(model, task, source, of_edges):
    _, findings = of_edges
    superfluous = findings.facts["superfluous"]
    useless = superfluous["names"]
    assert {"input->m1", "a0.h0->m1"} <= set(useless)
    assert useless == [named(row) for row in findings.where(verdict="superfluous")]
    left = [name for name in EDGES[:4] if name not in useless]
    wanted = edge_kl(model, task, left, source.mean) - edge_kl(model, task, EDGES[:4], source.mean)
    assert superfluous["together"]["kl_minus_circuit"].mean == pytest.approx(wanted.mean().item(), abs=1e-5)
    each = {named(row): row["kl_minus_circuit"].mean for row in findings.rows}
    assert superfluous["kl_minus_circuit_apart"] == pytest.approx(sum(each[name] for name in useless))


def test_the_complement_keeps_everything_else(model, task, source, of_nodes, of_edges):
    run, findings = of_nodes
    level = run.circuit.level
    drawn = random_circuits(level, len(KEPT), 3, seed=0)
    for measures, circuit in zip(complements(findings), (run.circuit, *drawn), strict=True):
        others = level.kept(~circuit.mask)
        assert len(others) == len(level) - len(KEPT)
        wanted = node_kl(model, task, others, source.mean).mean().item()
        assert measures["kl"].mean == pytest.approx(wanted, rel=1e-4)
    run, findings = of_edges
    others = run.circuit.level.kept(~run.circuit.mask)
    assert len(others) == 262 - 6
    wanted = edge_kl(model, task, others, source.mean).mean().item()
    assert findings.metrics["complement_kl"].mean == pytest.approx(wanted, rel=1e-4)
    assert findings.metrics["clean_kl"].mean == 0
    assert findings.metrics["clean_accuracy"].mean > 0.95


def test_parts_that_could_not_be_left_out_are_in_no_question(model, task, source, tmp_path):
    names = Nodes.of(model.config).select(["*", "!a1", "a1.h[01]"])
    run = by_hand(model, source, names, selected=["a1"])
    findings = minimal(model, task, run, tmp_path, replace(UNFITTED, random_complements=2))
    assert {named(row) for row in findings.rows} == {"a1.h0", "a1.h1"}
    drawn = random_circuits(run.circuit.level, len(names), 2, 0, among=["a1"])
    for measures, circuit in zip(complements(findings), (run.circuit, *drawn), strict=True):
        others = [name for name in run.circuit.level.names if name not in circuit.names or not name.startswith("a1")]
        assert len(others) == 15 - 2
        wanted = node_kl(model, task, others, source.mean).mean().item()
        assert measures["kl"].mean == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("names", [KEPT[:4], EDGES[:4]], ids=["components", "edges"])
def test_a_refit_gives_every_circuit_constants_of_its_own(model, task, source, tmp_path, names):
    run = by_hand(model, source, names, "optimal")
    settings = MinimalSettings(refit=True, random_complements=0, fit=QUICK)
    findings = minimal(model, task, run, tmp_path, settings)
    batches = list(task.batches("test", task.n_test))

    def fitted_kl(kept, *others) -> torch.Tensor:
        mask = run.circuit.level.mask(kept).unsqueeze(0)
        mask = ~mask if others else mask
        fitted = fit_constants(model, task, run.circuit.level, mask, [source.mean], QUICK, others=others)
        return circuit_behaviour(model, batches, run.circuit.level, mask, fitted.sets).kl[0]

    whole = fitted_kl(names)
    assert findings.metrics["circuit_kl"].mean == pytest.approx(whole.mean().item(), rel=1e-3)
    row = next(row for row in findings.rows if named(row) == names[0])
    wanted = paired_difference(fitted_kl(names[1:]), whole)
    assert row["kl_minus_circuit"].mean == pytest.approx(wanted.mean, rel=1e-3, abs=1e-4)
    unfitted = minimal(model, task, run, tmp_path, replace(settings, refit=False))
    assert findings.metrics["circuit_kl"].mean < unfitted.metrics["circuit_kl"].mean
    complement = fitted_kl(names, source.mean, source.zero).mean().item()
    assert findings.metrics["complement_kl"].mean == pytest.approx(complement, rel=1e-3)
    assert unfitted.metrics["complement_kl"] == findings.metrics["complement_kl"]


@pytest.mark.parametrize("kind", ["zero", "resample", "noise", "counterfactual"])
def test_the_run_s_own_ablation_is_used(model, task, source, tmp_path, kind):
    run = by_hand(model, source, ablation=kind)
    ablation = ABLATION_KINDS[kind].prepare(source)
    run = replace(run, constants=ablation if ABLATION_KINDS[kind].constant else None)
    findings = minimal(model, task, run, tmp_path, UNFITTED)
    masks = torch.stack([run.circuit.mask, ~run.circuit.mask])
    wanted = circuit_behaviour(model, task.batches("test", task.n_test), run.circuit.level, masks, [ablation])
    assert findings.facts["ablation"] == kind
    assert findings.metrics["circuit_kl"].mean == pytest.approx(wanted.kl[0].mean().item(), rel=1e-5)
    assert findings.metrics["complement_kl"].mean == pytest.approx(wanted.kl[1].mean().item(), rel=1e-5)


def test_results_table_and_figure(of_nodes, of_edges):
    for (run, findings), what in ((of_nodes, "component"), (of_edges, "edge")):
        assert findings.folder.name == "minimal_0"
        results = json.loads((findings.folder / "results.json").read_text())
        assert results["command"] == "minimal"
        assert results["circuit"] == run.circuit.counts()
        assert results["ablation"] == "mean"
        assert results["metrics"]["complement_kl"] == findings.metrics["complement_kl"].as_json()
        assert [row[what] for row in results["rows"]] == [named(row) for row in findings.rows]
        assert results["superfluous"]["names"] == findings.facts["superfluous"]["names"]
        assert results["settings"]["tolerance"] == 0.001
        with (findings.folder / "tables" / "parts.csv").open() as file:
            table = list(csv.DictReader(file))
        assert [float(row["kl_minus_circuit"]) for row in table] == [
            each["kl_minus_circuit"].mean for each in findings.rows
        ]
        assert [row["verdict"] for row in table] == [each["verdict"] for each in findings.rows]
        assert (findings.folder / "figures" / "worth.png").stat().st_size > 10_000


def test_nothing_is_overwritten(model, task, source, tmp_path):
    run = by_hand(model, source, ("m0",))
    assert [minimal(model, task, run, tmp_path, UNFITTED).folder.name for _ in range(2)] == ["minimal_0", "minimal_1"]


def test_a_verdict_needs_the_whole_interval():
    def of(low: float, high: float) -> str:
        return verdict(Estimate((low + high) / 2, 0.0, (low, high), 2), 0.1)

    assert [of(0.11, 0.2), of(0.05, 0.11), of(-0.3, 0.1)] == ["needed", "undecided", "superfluous"]
    assert verdict(Estimate(0.0, 0.0, (0.0, 0.0), 2), 0.0) == "superfluous"


def test_what_cannot_be_asked_is_refused(model, task, source, tmp_path):
    with pytest.raises(ConfigurationError, match="tolerance is -1"):
        MinimalSettings(tolerance=-1)
    with pytest.raises(ConfigurationError, match="tolerance is nan"):
        MinimalSettings(tolerance=float("nan"))
    with pytest.raises(ConfigurationError, match="random_complements is -2"):
        MinimalSettings(random_complements=-2)
    run = by_hand(model, source)
    with pytest.raises(ConfigurationError, match="under mean ablation, which has nothing to train"):
        minimal(model, task, run, tmp_path, MinimalSettings(refit=True))
    with pytest.raises(ConfigurationError, match="has no constants, which mean ablation needs"):
        minimal(model, task, replace(run, constants=None), tmp_path)
    for changed in (by_hand(model, source, ()), by_hand(model, source, selected=["m1"])):
        with pytest.raises(ConfigurationError, match="keeps none of the components that it could leave out"):
            minimal(model, task, changed, tmp_path)
    assert not list(tmp_path.iterdir())
