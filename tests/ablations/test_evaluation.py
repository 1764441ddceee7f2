"""Behaviour of circuits: one by one, all at once, in chunks, and with several scored positions."""

from dataclasses import fields

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations import evaluation
from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import Behaviour, circuit_behaviour, clean_behaviour
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource
from oa_train.batches import Batch
from oa_train.diagnostics.reference import reference_node_logits
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import copies_logits
from oa_train.engine.reading import read_values
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from oa_train.tasks import Induction
from tests.builders import random_batch, random_constants, small_ioi, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}
PATTERNS = ("* !a0.h0", "a0* a1* m0", "*", "* !m1 !a2.h3", "!*")


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec(dtype="float64"))


@pytest.fixture(scope="module")
def level(model):
    return Nodes.of(model.config)


@pytest.fixture(scope="module")
def masks(level):
    return torch.stack([level.selected(pattern.split()) for pattern in PATTERNS])


@pytest.fixture(scope="module")
def task():
    return small_ioi()


def ablation(name: str, model, task) -> Ablation:
    return ABLATION_KINDS[name].prepare(AblationSource(model, task, Nodes.of(model.config)))


def several() -> Induction:
    return Induction(length=5, repeated=3, answer_positions="every", n_means=32)


def assert_same(behaviour: Behaviour, expected: Behaviour, **tolerance: float) -> None:
    for name in MEASURES:
        assert getattr(behaviour, name).dtype == torch.float64
        assert_close(getattr(behaviour, name), getattr(expected, name), **(tolerance or EXACT))


def row_of(behaviour: Behaviour, index: int) -> Behaviour:
    return Behaviour(**{name: getattr(behaviour, name)[index : index + 1] for name in MEASURES})


@pytest.mark.parametrize("name", ["mean", "resample", "noise", "counterfactual"])
def test_circuits_at_once_are_circuits_one_at_a_time(model, level, masks, task, name):
    kind, batches = ablation(name, model, task), list(task.batches("test", 7, 4))
    together = circuit_behaviour(model, batches, level, masks, [kind])
    assert together.kl.shape == (len(masks), 7)
    for index in range(len(masks)):
        alone = circuit_behaviour(model, batches, level, masks[index : index + 1], [kind])
        assert_same(row_of(together, index), alone)


@pytest.mark.parametrize("rows_per_run", [1, 4, 8, 9, 1000])
def test_the_rows_of_a_run_change_no_result(model, level, masks, task, rows_per_run, monkeypatch):
    widths = []

    def counted(model, batch, level, masks, values):
        widths.append(len(batch) * len(masks))
        return copies_logits(model, batch, level, masks, values)

    batches = list(task.batches("test", 7, 4))
    different = [random_constants(level, 1, seed) for seed in range(len(masks))]
    for ablations in ([ablation("resample", model, task)], different):
        expected = circuit_behaviour(model, batches, level, masks, ablations)
        with monkeypatch.context() as patched:
            patched.setattr(evaluation, "copies_logits", counted)
            assert_same(circuit_behaviour(model, batches, level, masks, ablations, rows_per_run), expected)
    assert max(widths) <= max(rows_per_run, 4)


def test_each_circuit_has_its_own_ablation(model, level, masks, task):
    batches = list(task.batches("test", 7, 4))
    kinds = ["mean", "resample", "noise", "zero", "counterfactual"]
    ablations = [ablation(name, model, task) for name in kinds]
    together = circuit_behaviour(model, batches, level, masks, ablations)
    for index, kind in enumerate(ablations):
        assert_same(
            row_of(together, index), circuit_behaviour(model, batches, level, masks[index : index + 1], [kind])
        )


def test_circuits_with_spans_have_their_own_ablations_too(model, task):
    level = Nodes.of(model.config, ["heads", "mlp", "residual"], ["m*@S2", "r2@end", "a*.h*@-1"])
    source = AblationSource(model, task, level)
    kinds = [
        ABLATION_KINDS[name].prepare(source)
        for name in ("resample", "mean", "noise", "counterfactual", "clean", "resample")
    ]
    drawn = torch.rand(len(kinds), len(level), generator=torch.Generator().manual_seed(1)) < 0.5
    batches = list(task.batches("test", 7, 4))
    for ablations in (kinds, [kinds[0]] * len(kinds)):
        together = circuit_behaviour(model, batches, level, drawn, ablations)
        for index, kind in enumerate(ablations):
            alone = circuit_behaviour(model, batches, level, drawn[index : index + 1], [kind])
            assert_same(row_of(together, index), alone)


@pytest.mark.parametrize("name", ABLATION_KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_figures_do_not_depend_on_the_batch_size(model, level, masks, name, side):
    task = small_ioi(padding_side=side)
    kind = ablation(name, model, task)
    of_five = circuit_behaviour(model, task.batches("test", 16, 5), level, masks, [kind])
    of_sixteen = circuit_behaviour(model, task.batches("test", 16, 16), level, masks, [kind])
    assert_same(of_five, of_sixteen)
    other_side = small_ioi(padding_side="left" if side == "right" else "right")
    assert_same(circuit_behaviour(model, other_side.batches("test", 16), level, masks, [kind]), of_sixteen)
    assert ((of_five.kl[-1] > 1e-2) | ABLATION_KINDS[name].restores).all()


@pytest.mark.parametrize("name", ["mean", "resample", "noise"])
def test_several_scored_positions_are_averaged_for_each_prompt(model, level, masks, name):
    task = several()
    kind, batch = ablation(name, model, task), task.batch("test", 0, 2)
    assert batch.scored.shape == (2, 3)
    behaviour = circuit_behaviour(model, [batch], level, masks, [kind])
    values = kind.replacements(batch, lambda other: read_values(model, other, level))
    clean = scored_logits(model, batch)
    logits = reference_node_logits(model, batch, level, masks[1].double().expand(2, -1), values)
    for measure in MEASURES:
        each = MEASURES[measure](clean, logits, batch).double()
        assert_close(getattr(behaviour, measure)[1], each.mean(dim=1), rtol=0, atol=1e-6)  # the weights are float32
    positions = [MEASURES["cross_entropy"](clean, clean, batch)[:, place] for place in range(3)]
    whole = clean_behaviour(model, [batch])
    assert_close(whole.cross_entropy[0], sum(positions) / 3, rtol=0, atol=1e-6)


def test_the_whole_model_is_the_clean_model(model, level, masks, task):
    batches = list(task.batches("test", 7, 4))
    assert PATTERNS[2] == "*"
    whole = circuit_behaviour(model, batches, level, masks[2:3], [ablation("resample", model, task)])
    clean = clean_behaviour(model, batches)
    assert_same(whole, clean, rtol=0, atol=0)
    assert not clean.kl.any()
    assert clean.accuracy.mean() > 0.8


def test_losses_of_a_behaviour_have_the_sign_of_their_measure(model, level, masks, task):
    behaviour = circuit_behaviour(model, task.batches("test", 4), level, masks, [ablation("mean", model, task)])
    assert {field.name for field in fields(Behaviour)} == {*MEASURES, "identities"}
    for name, sign in LOSS_SIGNS.items():
        assert torch.equal(behaviour.loss(name), sign * getattr(behaviour, name))
    assert behaviour.loss("logit_difference")[2].mean() < behaviour.loss("logit_difference")[-1].mean()


def test_resampling_runs_the_model_once_for_all_circuits_of_a_run(model, level, masks, task):
    ran = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    batch: Batch = task.batch("test", 0, 4)
    circuit_behaviour(model, [batch], level, masks, [ablation("resample", model, task)])
    handle.remove()
    assert len(ran) == 3  # clean, donors, circuits


def test_edges_are_evaluated_in_pieces_that_fit(monkeypatch):
    model, batches = tiny_model("qwen2"), [random_batch([7, 4, 6, 5, 7], "left"), random_batch([6, 3])]
    graph = Graph.of(model.config)
    masks = torch.rand(3, len(graph), generator=torch.Generator().manual_seed(0)) < 0.8
    ablations = [random_constants(graph, seed=seed) for seed in range(3)]
    whole = circuit_behaviour(model, batches, graph, masks, ablations)
    runs = []
    monkeypatch.setattr("oa_train.engine.chunks.RUN_BYTES", 2**16)
    monkeypatch.setattr(
        "oa_train.ablations.evaluation.copies_logits",
        lambda *args: runs.append(len(args[1]) * len(args[3])) or copies_logits(*args),
    )
    pieces = circuit_behaviour(model, batches, graph, masks, ablations)
    assert max(runs) < 5
    for name in ("kl", "accuracy", "cross_entropy"):
        assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-9, atol=1e-12)
