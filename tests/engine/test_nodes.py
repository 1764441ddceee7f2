"""The laws of the engine for nodes that a family's entry in the table must obey, on every family."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.diagnostics.live_bytes import LiveBytes
from oa_train.diagnostics.reference import reference_node_logits
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.metrics.measures import loss_of
from oa_train.models.graph import Graph
from oa_train.models.hooks import Tap
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from tests.builders import (
    BOS,
    VOCABULARY,
    batch_of,
    random_batch,
    random_constants,
    random_mask,
    random_values,
    tiny_model,
    traces,
)
from tests.engine.selections import every_kind

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_kept_is_the_model_itself(any_model, side):
    batch, level = random_batch([9, 6, 4], side), every_kind(any_model)
    mask = torch.ones(3, len(level), dtype=torch.float64)
    logits = masked_logits(any_model, batch, level, mask, random_constants(level).replacements(batch))
    for row in range(3):
        tokens = batch.tokens[row][batch.attention_mask[row]]
        alone = any_model(input_ids=tokens.unsqueeze(0)).logits[0, -1]
        assert_close(logits[row, 0], alone, **EXACT)
    heads_and_mlps = Nodes.of(any_model.config)
    mask, values = mask[:, : len(heads_and_mlps)], random_constants(heads_and_mlps).replacements(batch)
    # No digit changes where nothing is decoded.
    assert torch.equal(masked_logits(any_model, batch, heads_and_mlps, mask, values), scored_logits(any_model, batch))


def test_the_reference_agrees_in_value_and_every_gradient(any_model):
    batch, level = random_batch([4, 5], "left"), every_kind(any_model)
    results = []
    for run in (masked_logits, reference_node_logits):
        mask = random_mask(2, len(level)).requires_grad_()
        constants = random_constants(level, positions=4, requires_grad=True)
        logits = run(any_model, batch, level, mask, constants.replacements(batch))
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        leaves = [mask, *constants.tables.values()]
        gradients = torch.autograd.grad((logits * weights).sum(), leaves, materialize_grads=True)
        results.append((logits, *gradients))
    assert (results[0][1] != 0).any()
    for fast, slow in zip(*results, strict=True):
        assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_padding_left_right_and_none_agree(any_model):
    level = every_kind(any_model)
    mask, constants = random_mask(1, len(level)), random_constants(level, positions=3)
    tokens = random_batch([6]).tokens.tolist()
    batches = [batch_of(tokens), batch_of(tokens, "left", 10), batch_of(tokens, "right", 10)]
    masked = [masked_logits(any_model, batch, level, mask, constants.replacements(batch)) for batch in batches]
    clean = [scored_logits(any_model, batch) for batch in batches]
    for logits in (masked, clean):
        assert_close(logits[1], logits[0], **EXACT)
        assert_close(logits[2], logits[0], **EXACT)


def test_all_ablated_depends_only_on_token_and_position(any_model):
    rows = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    rows[:, 0] = BOS
    rows[1, -1] = rows[0, -1]
    other = [*rows[0, :-1].tolist(), (int(rows[0, -1]) + 1) % VOCABULARY]
    batch, level = batch_of([*rows.tolist(), other]), Nodes.of(any_model.config)
    mask = torch.zeros(3, len(level), dtype=torch.float64)
    logits = masked_logits(any_model, batch, level, mask, random_constants(level).replacements(batch))
    assert_close(logits[0], logits[1], **EXACT)
    assert (logits[2] - logits[0]).abs().max() > 1e-3


def test_constants_have_gradients_only_where_the_mask_is_zero(archetype):
    batch, level = random_batch([6]), Nodes.of(archetype.config)
    mask = torch.full((1, len(level)), 0.4, dtype=torch.float64)
    mask[0, level.index("a1.h2")] = 0.0
    constants = random_constants(level, requires_grad=True)
    logits = masked_logits(archetype, batch, level, mask, constants.replacements(batch))
    tables = list(constants.tables.values())
    gradients = torch.autograd.grad(logits.square().sum(), tables, materialize_grads=True)
    for site, gradient in zip(constants.tables, gradients, strict=True):
        units = (gradient.abs().amax(dim=(0, 2)) > 0).nonzero().flatten().tolist()
        assert units == ([2] if site == Site("heads", 1) else [])


def test_what_is_protected_is_not_ablated(archetype):
    batch, level = random_batch([1, 1]), Nodes.of(archetype.config)
    mask = torch.zeros(2, len(level), dtype=torch.float64)
    values = random_constants(level).replacements(batch)
    clean = scored_logits(archetype, batch)
    assert_close(masked_logits(archetype, batch, level, mask, values), clean, **EXACT)
    unprotected = replace(batch, protected=torch.zeros_like(batch.protected))
    assert (masked_logits(archetype, unprotected, level, mask, values) - clean).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt_neo"])
def test_padding_is_finite_where_attention_is_computed_in_single_precision(family, side):
    # A window shorter than the padding hides all real tokens from it on the right, too.
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    batch, level, results = random_batch([12, 4, 1], side), Nodes.of(model.config), []
    for run in (masked_logits, reference_node_logits):
        mask = random_mask(3, len(level)).requires_grad_()
        logits = run(model, batch, level, mask, random_constants(level).replacements(batch))
        results.append((logits, *torch.autograd.grad(logits.sum(), mask)))
    assert all(tensor.isfinite().all() for pair in results for tensor in pair)
    for fast, slow in zip(*results, strict=True):
        assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    for row in range(3):
        alone = model(input_ids=batch.tokens[row][batch.attention_mask[row]].unsqueeze(0)).logits[0, -1]
        assert_close(scored_logits(model, batch)[row, 0], alone, rtol=1e-5, atol=1e-5)


def test_blocks_that_run_again_in_the_backward_pass_change_no_digit(shared_archetype):
    batch, level = random_batch([9, 6, 4]), every_kind(shared_archetype)
    before, results = traces(shared_archetype), []
    for recompute in (False, True):
        mask, values = random_mask(3, len(level)).requires_grad_(), random_values(level, 3, 9)
        logits = masked_logits(shared_archetype, batch, level, mask, values, recompute)
        loss = logits.softmax(-1)[..., :5].sum()
        gradients = torch.autograd.grad(loss, [mask, *values.values()], materialize_grads=True)
        results.append((logits, *gradients))
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)
    assert traces(shared_archetype) == before


@pytest.mark.parametrize("level_of", [Nodes.of, Graph.of])
@pytest.mark.parametrize("loss", ["kl", "cross_entropy", "logit_difference"])
def test_losses_and_gradients_stay_finite_where_the_model_rules_tokens_out(loss, level_of):
    model, batch = tiny_model("phi"), random_batch([5, 4])
    model.lm_head.bias.data[-3:] = -torch.inf  # as of a vocabulary that was padded
    answers = torch.tensor([[[1]], [[2]]])
    batch, level = replace(batch, answers=answers, distractors=answers + 2), level_of(model.config)
    mask, constants = random_mask(2, len(level)).requires_grad_(), random_constants(level, requires_grad=True)
    logits = masked_logits(model, batch, level, mask, constants.replacements(batch))
    losses = loss_of(loss, scored_logits(model, batch), logits, batch)
    gradients = torch.autograd.grad(losses.sum(), [mask, *constants.tables.values()])
    assert logits.isneginf().any()
    assert gradients[0].any()
    assert all(tensor.isfinite().all() for tensor in (losses, *gradients))


def test_blocks_that_run_again_keep_less_memory():
    model, batch = tiny_model("llama"), random_batch([12] * 8)
    level, kept = Nodes.of(model.config), []
    for recompute in (False, True):
        mask = random_mask(8, len(level)).requires_grad_()
        values = random_constants(level, requires_grad=True).replacements(batch)
        with LiveBytes() as live:
            before = live.now
            logits = masked_logits(model, batch, level, mask, values, recompute)
            kept.append(live.now - before)
        logits.sum().backward()
    assert kept[1] < 0.5 * kept[0]


def test_a_block_that_fails_leaves_no_trace():
    model, batch = tiny_model("gpt2"), random_batch([5])

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("in a tap")

    inside, before, clean = find_parts(model).mlps[1], traces(model), scored_logits(model, batch)
    with pytest.raises(RuntimeError, match="in a tap"):
        scored_logits(model, batch, [Tap(inside, "output", fail)], recompute=True)
    assert traces(model) == before
    assert torch.equal(scored_logits(model, batch), clean)
