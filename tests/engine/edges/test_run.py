"""Edge interventions against Hugging Face itself, the literal reference, and node interventions."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from oa_train.engine.forward import scored_logits
from oa_train.diagnostics.edge_reference import reference_edge_logits
from oa_train.engine.edges.run import edge_logits
from oa_train.engine.nodes import node_logits
from oa_train.models.selection import Components
from oa_train.models.families import FAMILIES, Dimensions
from oa_train.models.graph import Graph
from tests.builders import BOS, random_batch, random_constants, random_mask, random_replacements, tiny_model
from tests.precision import WithoutSinglePrecision

EXACT = {"rtol": 0, "atol": 1e-12}


def ones(model, rows: int) -> torch.Tensor:
    return torch.ones(rows, Graph.of(model.config).n_edges, dtype=torch.float64)


@pytest.mark.parametrize("engine", ["kernels", "stock"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_all_kept_is_the_model_itself(any_model, side, engine):
    batch = random_batch([9, 6, 4], side)
    values = random_constants(any_model).replacements(batch)
    edges = edge_logits(any_model, batch, ones(any_model, 3), values, BOS, engine=engine)
    assert_close(edges, scored_logits(any_model, batch), **EXACT)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_values_and_gradients_of_the_stock_engine_are_those_of_the_reference(any_model, side, recompute):
    batch, graph = random_batch([6, 4], side), Graph.of(any_model.config)
    found = []
    for run in (partial(edge_logits, engine="stock", recompute=recompute), reference_edge_logits):
        mask = random_mask(2, graph.n_edges).requires_grad_()
        if side == "right":
            constants = random_constants(any_model, requires_grad=True)
            leaves, values = constants.tensors(), constants.replacements(batch)
        else:
            values = random_replacements(any_model, 2, 6)
            leaves = values.tensors()
        logits = run(any_model, batch, mask, values, BOS)
        gradients = torch.autograd.grad(logits.softmax(-1)[..., :4].sum(), [mask, *leaves])
        found.append((logits, *gradients))
    for fast, slow in zip(*found, strict=True):
        assert slow.abs().max() > 1e-8
        assert_close(fast, slow, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ["kernels", "stock"])
def test_gradients_to_the_mask_are_differences(any_model, engine):
    # The reference shares the rule for partial masks; finite differences share nothing.
    batch, graph = random_batch([5, 4]), Graph.of(any_model.config)
    values = random_constants(any_model).replacements(batch)
    generator = torch.Generator().manual_seed(3)
    middle, direction = (torch.rand(2, graph.n_edges, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = (0.2 + 0.6 * middle).requires_grad_()

    def figure(at: torch.Tensor) -> torch.Tensor:
        return edge_logits(any_model, batch, at, values, BOS, engine=engine)[..., :5].sum()

    (gradient,) = torch.autograd.grad(figure(mask), mask)
    with torch.no_grad():
        difference = (figure(mask + 1e-6 * direction) - figure(mask - 1e-6 * direction)) / 2e-6
    assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("engine", ["kernels", "stock"])
@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if not family.post_norms))
def test_a_node_mask_is_an_edge_mask_with_equal_edges_out_of_each_node(family, engine):
    # With post-norms a head's write depends on the heads beside it, so the two are different ablations.
    model, batch = tiny_model(family), random_batch([7, 5], "left")
    graph, n = Graph.of(model.config), len(Components.of(Dimensions.of(model.config)))
    by_node = random_mask(2, n)
    constants = random_constants(model)
    values = constants.replacements(batch)
    # The embedding is no component: it is always kept.
    by_source = torch.cat([torch.ones(2, 1, dtype=torch.float64), by_node], dim=1)
    with WithoutSinglePrecision():
        edges = edge_logits(model, batch, by_source[:, graph.edge_sources], values, BOS, engine=engine)
        nodes = node_logits(model, batch, by_node, constants.replacements(batch), BOS)
    assert_close(edges, nodes, **EXACT)


def test_an_edge_that_is_cut_changes_what_its_reader_reads_and_nothing_before():
    model, batch = tiny_model("gpt2"), random_batch([7])
    graph = Graph.of(model.config)
    values = random_constants(model).replacements(batch)
    whole = ones(model, 1)
    last = whole.clone()
    # An edge into the logits changes them; without it all is as it was.
    last[0, graph.n_edges - 1] = 0
    changed = edge_logits(model, batch, last, values, BOS)
    assert not torch.allclose(changed, scored_logits(model, batch))
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_model_is_untouched_after_an_exception():
    model, batch = tiny_model("llama"), random_batch([5])
    before = scored_logits(model, batch)
    values = random_constants(model).replacements(batch)
    with pytest.raises(IndexError):
        edge_logits(model, replace(batch, tokens=batch.tokens + 1000), ones(model, 1), values, BOS)
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(scored_logits(model, batch), before)
