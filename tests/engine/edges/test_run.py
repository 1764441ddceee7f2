"""Edges against Hugging Face itself, the literal reference, finite differences and the engine for nodes."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.engine.edges.run import edge_row_bytes, edges_called, run_edges
from oa_train.engine.forward import as_written, model_inputs, scored_logits
from oa_train.engine.nodes import node_taps
from oa_train.models.families import FAMILIES
from oa_train.models.selection import Nodes
from tests.builders import random_mask, tiny_model
from tests.engine.edges.helpers import (
    ARCHETYPES,
    all_kept,
    graph_of,
    mask_of,
    protected_batch,
    random_values,
    values_of_kind,
)
from tests.engine.edges.reference import reference_edge_logits
from tests.precision import WithoutSinglePrecision

EXACT = {"rtol": 0, "atol": 1e-12}


def results(model, batch, kind="shared", run=run_edges, **options):
    """Logits, and the gradients of a function of them to the mask and to the values of every site."""
    mask, values = mask_of(model, len(batch)), values_of_kind(model, batch, kind)
    logits = run(model, batch, graph_of(model), mask, values, **options)
    return logits, *torch.autograd.grad(logits.softmax(-1)[..., :4].sum(), [mask, *values.values()])


def assert_same(results, expected):
    # A source none of whose edges is cut has no gradient to its value.
    assert sum(bool(other.abs().max() > 1e-8) for other in expected) > len(expected) / 2
    for tensor, other in zip(results, expected, strict=True):
        assert_close(tensor, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_kept_is_the_model_itself(any_model, side):
    batch = protected_batch([9, 6, 4], side)
    logits = run_edges(any_model, batch, graph_of(any_model), all_kept(any_model, 3), random_values(any_model))
    assert_close(logits.detach(), scored_logits(any_model, batch).detach(), **EXACT)


def test_values_and_gradients_are_those_of_the_reference(any_model):
    batch = protected_batch([5, 3], "left")
    expected = results(any_model, batch, run=reference_edge_logits)
    assert_same(results(any_model, batch), expected)
    assert_same(results(any_model, batch, recompute=True), expected)


@pytest.mark.parametrize(("side", "kind"), [("right", "per position"), ("left", "per row and position")])
@pytest.mark.parametrize("family", ARCHETYPES)
def test_values_of_every_kind_have_the_gradients_of_the_reference(family, side, kind):
    model, batch = tiny_model(family), protected_batch([6, 4], side)
    with WithoutSinglePrecision():
        expected = results(model, batch, kind, run=reference_edge_logits)
        assert_same(results(model, batch, kind), expected)
        assert_same(results(model, batch, kind, recompute=True), expected)


@pytest.mark.parametrize("family", ARCHETYPES)
def test_values_of_different_kinds_at_different_sites(family):
    model, batch = tiny_model(family), protected_batch([6, 4])
    outcomes = []
    for run in (run_edges, reference_edge_logits):
        mask, pooled = mask_of(model, 2), random_values(model)
        by_column = random_values(model, rows=2, slots=6, seed=1)
        values = replace(
            pooled, tensors={site: (by_column if site.kind == "mlp" else pooled)[site] for site in pooled}
        )
        with WithoutSinglePrecision():
            logits = run(model, batch, graph_of(model), mask, values)
            gradients = torch.autograd.grad(logits.softmax(-1)[..., :4].sum(), [mask, *values.values()])
        outcomes.append((logits, *gradients))
    assert_same(*outcomes)


@pytest.mark.parametrize("family", ARCHETYPES)
def test_gradients_to_the_mask_are_differences(family):
    # The reference shares the rule for partial masks; finite differences share nothing.
    model, batch = tiny_model(family), protected_batch([5, 4])
    graph, values = graph_of(model), random_values(model, gradients=False)
    generator = torch.Generator().manual_seed(3)
    middle, direction = (torch.rand(2, len(graph), generator=generator, dtype=torch.float64) for _ in range(2))
    mask = (0.2 + 0.6 * middle).requires_grad_()

    def figure(at):
        return run_edges(model, batch, graph, at, values)[..., :5].sum()

    with WithoutSinglePrecision():
        (gradient,) = torch.autograd.grad(figure(mask), mask)
        with torch.no_grad():
            difference = (figure(mask + 1e-6 * direction) - figure(mask - 1e-6 * direction)) / 2e-6
    assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj", "llama"])
def test_a_node_mask_is_an_edge_mask_with_equal_edges_out_of_each_node(family):
    # With post-norms a head's write depends on the heads beside it, so the two are different ablations.
    assert not FAMILIES[family].post_norms
    model, batch = tiny_model(family), protected_batch([7, 5], "left")
    graph, nodes = graph_of(model), Nodes.of(model.config)
    by_node, values = random_mask(2, len(nodes)), random_values(model, gradients=False)
    # The embedding is no node here: it is always kept.
    by_source = torch.cat([torch.ones(2, 1, dtype=torch.float64), by_node], dim=1)
    with WithoutSinglePrecision():
        edges = run_edges(model, batch, graph, by_source[:, graph.edge_sources], values)
        expected = scored_logits(model, batch, node_taps(model, nodes, by_node, values, batch.layout))
    assert_close(edges, expected, **EXACT)


def test_a_cut_edge_changes_the_input_of_its_reader():
    model, batch = tiny_model("gpt2"), protected_batch([7])
    mask = all_kept(model, 1)
    mask[0, -1] = 0  # into the logits
    changed = run_edges(model, batch, graph_of(model), mask, random_values(model))
    assert not torch.allclose(changed, scored_logits(model, batch))


def test_a_called_model_has_logits_at_every_position(common_model):
    batch = protected_batch([6, 4], "left")
    graph, mask, values = graph_of(common_model), mask_of(common_model, 2), random_values(common_model)
    with as_written(common_model), edges_called(common_model, graph, mask, values, batch.layout):
        logits = common_model(**model_inputs(batch)).logits
    assert_close(logits[:, -1:], run_edges(common_model, batch, graph, mask, values), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_is_untouched_after_an_exception(family):
    model, batch = tiny_model(family), protected_batch([5])
    expected, before = results(model, batch), scored_logits(model, batch)

    def fail(*_):
        raise KeyError("in the middle")

    handle = model.get_output_embeddings().register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(KeyError):
            results(model, batch)
        with (
            pytest.raises(KeyError),
            edges_called(model, graph_of(model), mask_of(model, 1), random_values(model), batch.layout),
        ):
            model(batch.tokens)
    handle.remove()
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(scored_logits(model, batch), before)
    assert_same(results(model, batch), expected)


def test_bytes_of_a_row_are_those_of_written_and_read_streams():
    model, batch = tiny_model("llama"), protected_batch([6, 4])
    graph, stream = graph_of(model), 6 * 32 * 8
    assert edge_row_bytes(model, batch, gradients=True) == (2 * graph.n_sources + graph.n_readers) * stream
    assert edge_row_bytes(model, batch, gradients=False) == (graph.n_sources + 4 + 2 + 2 + 1) * stream
