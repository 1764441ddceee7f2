"""Memory, precision and order of calls of the engine for edges."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.diagnostics.live_bytes import LiveBytes
from oa_train.engine.edges.run import run_edges
from oa_train.engine.edges.workspace import Workspace, free_workspace, workspace_of
from tests.builders import tiny_model
from tests.engine.edges.helpers import ARCHETYPES, graph_of, mask_of, protected_batch, random_values
from tests.engine.edges.reference import reference_edge_logits
from tests.engine.edges.test_run import assert_same, results
from tests.precision import WithoutSinglePrecision


@pytest.mark.parametrize("family", ARCHETYPES)
def test_several_scored_positions(family):
    model, batch = tiny_model(family), protected_batch([6, 4])
    answers = torch.full((2, 2, 1), 5)
    scored, weights = torch.tensor([[2, 5], [3, 3]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    batch = replace(batch, scored=scored, weights=weights, answers=answers, distractors=answers + 1)
    with WithoutSinglePrecision():
        assert_same(results(model, batch), results(model, batch, run=reference_edge_logits))


@pytest.mark.parametrize("family", ARCHETYPES)
def test_without_gradients_the_logits_are_the_same_and_nothing_is_kept(family):
    model, batch = tiny_model(family), protected_batch([6, 4], "left")
    graph, mask, values = graph_of(model), mask_of(model, 2), random_values(model)
    with torch.no_grad():
        logits = run_edges(model, batch, graph, mask, values)
    assert_close(logits, run_edges(model, batch, graph, mask, values).detach(), rtol=1e-9, atol=1e-12)
    assert logits.grad_fn is None


@pytest.mark.parametrize("family", ARCHETYPES)
def test_only_one_of_both_is_trained(family):
    model, batch = tiny_model(family), protected_batch([6, 4])
    _, to_mask, *to_values = results(model, batch)
    mask, values = mask_of(model, 2), random_values(model)
    for trained, expected in (([mask], [to_mask]), (list(values.values()), to_values)):
        inputs = mask if trained[0] is mask else mask.detach()
        constants = values if trained[0] is not mask else values.mapped(torch.detach)
        logits = run_edges(model, batch, graph_of(model), inputs, constants)
        assert_same(torch.autograd.grad(logits.softmax(-1)[..., :4].sum(), trained), expected)


def test_two_forward_passes_before_two_backward_passes():
    model, batches = tiny_model("gpt2"), [protected_batch([6, 4]), protected_batch([5, 5, 3])]
    expected = [results(model, batch) for batch in batches]
    runs = []
    for batch in batches:
        mask, values = mask_of(model, len(batch)), random_values(model)
        runs.append((run_edges(model, batch, graph_of(model), mask, values), [mask, *values.values()]))
    for (logits, leaves), other in zip(runs, expected, strict=True):
        gradients = torch.autograd.grad(logits.softmax(-1)[..., :4].sum(), leaves)
        assert_same((logits, *gradients), other)


def test_memory_of_one_step_does_not_show_in_the_next():
    model = tiny_model("llama")
    large, small = protected_batch([9, 9, 4]), protected_batch([5, 3], "left")
    fresh = results(tiny_model("llama"), small)
    results(model, large)
    first = results(model, small)
    copies = [tensor.clone() for tensor in first]
    assert_same(first, fresh)
    results(model, large, recompute=True)
    # What was returned is nobody's working memory.
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(first, copies, strict=True))


def test_training_goes_on_after_evaluation_in_inference_mode():
    model, batch = tiny_model("llama"), protected_batch([6, 4])
    with torch.inference_mode():
        run_edges(model, batch, graph_of(model), mask_of(model, 2), random_values(model))
    assert_same(results(model, batch), results(tiny_model("llama"), batch))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_nothing_is_left_of_a_run_that_is_dropped(family):
    model, batch = tiny_model(family), protected_batch([6, 4])
    mask, values = mask_of(model, 2), random_values(model)
    with LiveBytes() as live:
        run_edges(model, batch, graph_of(model), mask, values)
        free_workspace(model)  # what the projections have given back
        assert live.now < 10_000


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_left_after_the_backward_pass_though_logits_are_kept(recompute):
    model, batch = tiny_model("gpt2"), protected_batch([9, 9, 9])
    mask, values = mask_of(model, 3), random_values(model)
    with LiveBytes() as live:
        logits = run_edges(model, batch, graph_of(model), mask, values, recompute=recompute)
        between = live.now
        torch.autograd.grad(logits.sum(), mask)
        free_workspace(model)
        assert live.now < between / 10


@pytest.mark.parametrize("family", ARCHETYPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_hidden_layers_of_mlps_run_again_if_they_are_not_kept(family, recompute):
    model, batch, ran = tiny_model(family), protected_batch([6, 4]), []
    logits = run_edges(model, batch, graph_of(model), mask_of(model, 2), random_values(model), recompute)
    activations = [part for name, part in model.named_modules() if name.endswith(("mlp.act", "_fn"))]
    for part in activations:
        part.register_forward_hook(lambda *_: ran.append(1))
    logits.sum().backward()
    assert len(ran) == (3 if recompute else 0)


def test_a_second_backward_pass_is_refused():
    model, batch = tiny_model("gpt2"), protected_batch([6])
    mask, values = mask_of(model, 1), random_values(model)
    loss = run_edges(model, batch, graph_of(model), mask, values).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(family, autocast):
    exact, batch = tiny_model(family), protected_batch([6, 4], "left")
    expected = results(exact, batch)
    model = tiny_model(family).to(torch.float32 if autocast else torch.bfloat16)
    mask = mask_of(model, 2).detach().float().requires_grad_()
    values = random_values(model).mapped(lambda tensor: tensor.detach().float().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = run_edges(model, batch, graph_of(model), mask, values)
    gradients = torch.autograd.grad(logits.float().softmax(-1)[..., :4].sum(), [mask, *values.values()])
    assert (logits.double() - expected[0]).norm() < 0.05 * expected[0].norm()
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    for kind in ("mask", "embedding", "heads", "mlp"):
        chosen = [number for number, site in enumerate(["mask", *values]) if kind == getattr(site, "kind", site)]
        half = torch.cat([gradients[number].double().flatten() for number in chosen])
        exactly = torch.cat([expected[1 + number].flatten() for number in chosen])
        assert torch.cosine_similarity(half, exactly, dim=0) > 0.95


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
    batch, graph = protected_batch([1]), graph_of(any_model)
    before = {name: weight.clone() for name, weight in any_model.named_parameters()}
    for protected in (batch.protected, ~batch.protected):
        run_edges(
            any_model, replace(batch, protected=protected), graph, mask_of(any_model, 1), random_values(any_model)
        ).sum().backward()
    for name, weight in any_model.named_parameters():
        assert torch.equal(weight, before[name]), name
