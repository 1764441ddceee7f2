"""The fast engine for edges against stock autograd and the literal reference, in every family and kind of run."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.base import SourceValues
from oa_train.engine.forward import scored_logits
from oa_train.diagnostics.edge_reference import reference_edge_logits
from oa_train.engine.edges.run import edge_logits
from oa_train.diagnostics.live_bytes import LiveBytes
from oa_train.engine.edges.workspace import Workspace, free_workspace, workspace_of
from oa_train.models.graph import Graph
from tests.builders import BOS, random_batch, random_constants, random_mask, random_replacements, tiny_model

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def masks(model, rows: int) -> torch.Tensor:
    return random_mask(rows, Graph.of(model.config).n_edges).requires_grad_()


def leaves_of(model, batch, kind: str) -> tuple[tuple[torch.Tensor, ...], SourceValues]:
    """Trained tensors, and the replacements that they make."""
    rows, width = batch.tokens.shape
    if kind == "per row and position":
        values = random_replacements(model, rows, width)
        return values.tensors(), values
    constants = random_constants(model, 1 if kind == "shared" else width, requires_grad=True)
    return constants.tensors(), constants.replacements(batch)


def results(model, batch, kind: str = "shared", run=edge_logits, **options) -> tuple[torch.Tensor, ...]:
    """Logits, and the gradients of a function of them to the mask and to everything that is trained."""
    mask, (leaves, values) = masks(model, len(batch)), leaves_of(model, batch, kind)
    logits = run(model, batch, mask, values, BOS, **options)
    return logits, *torch.autograd.grad(logits.softmax(-1)[..., :4].sum(), [mask, *leaves])


def assert_same(found, expected, **tolerances) -> None:
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-8
        assert_close(one, other, **(tolerances or CLOSE))


@pytest.mark.parametrize(
    ("side", "kind"), [("left", "shared"), ("right", "per position"), ("left", "per row and position")]
)
def test_values_and_gradients_are_those_of_stock_autograd(any_model, side, kind):
    batch = random_batch([6, 4], side)
    expected = results(any_model, batch, kind, engine="stock")
    assert_same(results(any_model, batch, kind), expected)
    assert_same(results(any_model, batch, kind, recompute=True), expected)


def test_values_and_gradients_are_those_of_the_reference(any_model):
    batch = random_batch([5, 3], "left")
    assert_same(results(any_model, batch), results(any_model, batch, run=reference_edge_logits))


def test_several_scored_positions(any_model):
    batch = random_batch([6, 4])
    answers = torch.full((2, 2, 1), 5)
    scored, weights = torch.tensor([[2, 5], [3, 3]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    batch = replace(batch, scored=scored, weights=weights, answers=answers, distractors=answers + 1)
    assert_same(results(any_model, batch), results(any_model, batch, engine="stock"))


def test_without_gradients_the_values_are_the_same_and_nothing_is_kept(any_model):
    batch = random_batch([6, 4], "left")
    mask, (_, values) = masks(any_model, 2), leaves_of(any_model, batch, "shared")
    with torch.no_grad():
        found = edge_logits(any_model, batch, mask, values, BOS)
    assert_close(found, edge_logits(any_model, batch, mask, values, BOS, engine="stock").detach(), **CLOSE)
    assert found.grad_fn is None


@pytest.mark.parametrize("wanted", ["mask", "constants"])
def test_only_one_of_both_is_trained(any_model, wanted):
    batch = random_batch([6, 4])
    found = []
    for engine in ("kernels", "stock"):
        constants = random_constants(any_model, requires_grad=wanted == "constants")
        mask = masks(any_model, 2).detach().requires_grad_(wanted == "mask")
        leaves = constants.tensors() if wanted == "constants" else (mask,)
        logits = edge_logits(any_model, batch, mask, constants.replacements(batch), BOS, engine=engine)
        found.append(torch.autograd.grad(logits.softmax(-1)[..., :4].sum(), leaves))
    assert_same(*found)


def test_two_forward_passes_before_two_backward_passes():
    model, batches = tiny_model("gpt2"), [random_batch([6, 4]), random_batch([5, 5, 3])]
    expected = [results(model, batch) for batch in batches]
    runs = []
    for batch in batches:
        mask, (leaves, values) = masks(model, len(batch)), leaves_of(model, batch, "shared")
        runs.append((edge_logits(model, batch, mask, values, BOS), mask, leaves))
    for (logits, mask, leaves), one in zip(runs, expected, strict=True):
        gradients = torch.autograd.grad(logits.softmax(-1)[..., :4].sum(), [mask, *leaves])
        assert_same((logits, *gradients), one)


def test_memory_of_one_step_does_not_show_in_the_next():
    model = tiny_model("llama")
    large, small = random_batch([9, 9, 4]), random_batch([5, 3], "left")
    fresh = results(tiny_model("llama"), small)
    results(model, large)
    first = results(model, small)
    copies = [one.clone() for one in first]
    assert_same(first, fresh)
    results(model, large, recompute=True)
    # What was returned is nobody's working memory.
    assert all(torch.equal(one, copy) for one, copy in zip(first, copies, strict=True))


def test_training_goes_on_after_evaluation_in_inference_mode():
    model, batch = tiny_model("llama"), random_batch([6, 4])
    with torch.inference_mode():
        mask, values = random_mask(2, Graph.of(model.config).n_edges), random_constants(model).replacements(batch)
        edge_logits(model, batch, mask, values, BOS)
    assert_same(results(model, batch), results(tiny_model("llama"), batch))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_nothing_is_left_of_a_run_that_is_dropped(family):
    model, batch = tiny_model(family), random_batch([6, 4])
    mask, (_, values) = masks(model, 2), leaves_of(model, batch, "shared")
    with LiveBytes() as live:
        edge_logits(model, batch, mask, values, BOS)
        free_workspace(model)  # what the projections have given back
        assert live.now < 10_000


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_left_after_the_backward_pass_though_logits_are_kept(recompute):
    model, batch = tiny_model("gpt2"), random_batch([9, 9, 9])
    mask, (_, values) = masks(model, 3), leaves_of(model, batch, "shared")
    with LiveBytes() as live:
        logits = edge_logits(model, batch, mask, values, BOS, recompute=recompute)
        between = live.now
        torch.autograd.grad(logits.sum(), mask)
        free_workspace(model)
        assert live.now < between / 10


@pytest.mark.parametrize("engine", ["kernels", "stock"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_insides_of_mlps_run_again_if_they_are_not_kept(any_model, engine, recompute):
    if any_model.config.model_type == "opt":
        pytest.skip("has no module for them")
    batch, ran = random_batch([6, 4]), []
    mask, (_, values) = masks(any_model, 2), leaves_of(any_model, batch, "shared")
    logits = edge_logits(any_model, batch, mask, values, BOS, recompute=recompute, engine=engine)
    activations = [part for name, part in any_model.named_modules() if name.endswith(("mlp.act", "_fn"))]
    handles = [part.register_forward_hook(lambda *_: ran.append(1)) for part in activations]
    logits.sum().backward()
    for handle in handles:
        handle.remove()
    assert len(ran) == (3 if recompute else 0)


def test_a_second_backward_pass_is_refused():
    model, batch = tiny_model("gpt2"), random_batch([6])
    mask, (_, values) = masks(model, 1), leaves_of(model, batch, "shared")
    loss = edge_logits(model, batch, mask, values, BOS).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_works_on_after_an_exception(family):
    model, batch = tiny_model(family), random_batch([5])
    expected, before = results(model, batch), scored_logits(model, batch)
    mask, (_, values) = masks(model, 1), leaves_of(model, batch, "shared")

    def fail(*_: object) -> None:
        raise KeyError("in the middle")

    handle = model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        edge_logits(model, batch, mask, values, BOS)
    handle.remove()
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(scored_logits(model, batch), before)
    assert_same(results(model, batch), expected)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(family, autocast):
    exact, batch = tiny_model(family), random_batch([6, 4], "left")
    expected = results(exact, batch)
    model = tiny_model(family).to(torch.float32 if autocast else torch.bfloat16)
    mask = masks(model, 2).detach().float().requires_grad_()
    values = random_constants(model)
    trained = [one.float().requires_grad_() for one in values.tensors()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = edge_logits(model, batch, mask, SourceValues(*(one.unsqueeze(1) for one in trained)), BOS)
    gradients = torch.autograd.grad(logits.float().softmax(-1)[..., :4].sum(), [mask, *trained])
    assert_close(logits.double(), expected[0], rtol=0.1, atol=0.1)
    for one, other in zip(gradients, expected[1:], strict=True):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one.double().flatten(), other.flatten(), dim=0) > 0.95


def test_a_workspace_keeps_one_tensor_of_a_name():
    workspace, kind = Workspace(), (torch.float32, torch.device("cpu"))
    first = workspace.take("name", (3, 4, 5), *kind)
    second = workspace.take("name", (3, 4, 5), *kind)
    assert first.data_ptr() != second.data_ptr()
    workspace.give("name", first)
    smaller = workspace.take("name", (2, 4, 5), *kind)
    assert smaller.data_ptr() == first.data_ptr()
    assert smaller.shape == (2, 4, 5)
    workspace.give("name", smaller)
    assert workspace.take("name", (9, 4, 5), *kind).shape == (9, 4, 5)


def test_every_model_has_its_own_workspace():
    one, other = tiny_model("gpt2"), tiny_model("gpt2")
    assert workspace_of(one) is workspace_of(one)
    assert workspace_of(one) is not workspace_of(other)


def test_a_single_token_leaves_the_weights_as_they_are(any_model):
    # What is spread over rows and positions is the weight itself where there is only one.
    batch, graph = random_batch([1]), Graph.of(any_model.config)
    before = {name: weight.clone() for name, weight in any_model.named_parameters()}
    mask = random_mask(1, graph.n_edges).requires_grad_()
    values = random_constants(any_model, requires_grad=True).replacements(batch)
    for bos in (BOS, None):
        edge_logits(any_model, batch, mask, values, bos).sum().backward()
    for name, weight in any_model.named_parameters():
        assert torch.equal(weight, before[name]), name
