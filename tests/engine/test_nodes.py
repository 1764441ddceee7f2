"""The fast node interventions against Hugging Face itself and against the slow reference."""

import pytest
import torch
from torch.testing import assert_close

from oa_train.diagnostics.live_bytes import LiveBytes
from oa_train.diagnostics.reference import reference_node_logits
from oa_train.engine.forward import scored_logits
from oa_train.engine.nodes import node_logits
from oa_train.models.families import Dimensions, find_parts
from oa_train.models.selection import Components
from oa_train.models.taps import Tap, tapped
from tests.builders import (
    BOS,
    VOCABULARY,
    batch_of,
    random_batch,
    random_constants,
    random_mask,
    random_replacements,
    tiny_model,
)

EXACT = {"rtol": 0, "atol": 1e-12}


def components_of(model) -> Components:
    return Components.of(Dimensions.of(model.config))


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_kept_is_the_model_itself(any_model, side):
    batch = random_batch([9, 6, 4], side)
    mask = torch.ones(3, len(components_of(any_model)), dtype=torch.float64)
    logits = node_logits(any_model, batch, mask, random_constants(any_model).replacements(batch), BOS)
    for row in range(3):
        tokens = batch.tokens[row][batch.attention_mask[row]]
        alone = any_model(input_ids=tokens.unsqueeze(0)).logits[0, -1]
        assert_close(logits[row, 0], alone, **EXACT)
    assert torch.equal(logits, scored_logits(any_model, batch))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt_neo"])
def test_padding_is_finite_where_attention_is_computed_in_single_precision(family, side):
    # A window shorter than the padding hides all real tokens from it on the right, too.
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    batch = random_batch([12, 4, 1], side)
    found = []
    for run in (node_logits, reference_node_logits):
        mask = random_mask(3, len(components_of(model))).requires_grad_()
        logits = run(model, batch, mask, random_constants(model).replacements(batch), BOS)
        found.append((logits, *torch.autograd.grad(logits.sum(), mask)))
    assert all(tensor.isfinite().all() for pair in found for tensor in pair)
    for fast, slow in zip(*found, strict=True):
        assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    for row in range(3):
        alone = model(input_ids=batch.tokens[row][batch.attention_mask[row]].unsqueeze(0)).logits[0, -1]
        assert_close(scored_logits(model, batch)[row, 0], alone, rtol=1e-5, atol=1e-5)
    assert not hooks_of(model)


def test_all_ablated_depends_only_on_token_and_position(any_model):
    rows = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    rows[:, 0] = BOS
    rows[1, -1] = rows[0, -1]
    shorter = rows[0, 1:].tolist()
    batch = batch_of([*rows.tolist(), [BOS, *shorter]], "right")
    mask = torch.zeros(3, len(components_of(any_model)), dtype=torch.float64)
    logits = node_logits(any_model, batch, mask, random_constants(any_model).replacements(batch), BOS)
    assert_close(logits[0], logits[1], **EXACT)
    other = batch_of([[*rows[0, :-1].tolist(), (int(rows[0, -1]) + 1) % VOCABULARY]])
    mask = mask[:1]
    changed = node_logits(any_model, other, mask, random_constants(any_model).replacements(other), BOS)
    assert (changed[0] - logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["pooled", "per position", "per row"])
def test_equals_the_reference_in_value_and_gradient(any_model, side, kind):
    batch = random_batch([7, 5], side)
    found = []
    for run in (node_logits, reference_node_logits):
        mask = random_mask(2, len(components_of(any_model))).requires_grad_()
        if kind == "per row":
            replacements = random_replacements(any_model, 2, 7)
            leaves = (replacements.heads, replacements.mlps)
        else:
            constants = random_constants(any_model, 4 if kind == "per position" else 1, requires_grad=True)
            replacements, leaves = constants.replacements(batch), (constants.heads, constants.mlps)
        logits = run(any_model, batch, mask, replacements, BOS)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        found.append((logits, *torch.autograd.grad((logits * weights).sum(), (mask, *leaves))))
    assert (found[0][1] != 0).any()
    for fast, slow in zip(*found, strict=True):
        assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_constants_have_gradients_only_where_the_mask_is_zero(any_model):
    batch = random_batch([6])
    components = components_of(any_model)
    mask = torch.full((1, len(components)), 0.4, dtype=torch.float64)
    mask[0, components.index("a1.h2")] = 0.0
    constants = random_constants(any_model, requires_grad=True)
    logits = node_logits(any_model, batch, mask, constants.replacements(batch), BOS)
    heads, mlps = torch.autograd.grad(logits.square().sum(), (constants.heads, constants.mlps))
    nonzero = heads.abs().amax(dim=(1, 3)) > 0
    assert nonzero.nonzero().tolist() == [[1, 2]]
    assert not mlps.any()


def test_padding_left_right_and_none_agree(any_model):
    mask = random_mask(1, len(components_of(any_model)))
    constants = random_constants(any_model, n_positions=3)
    tokens = random_batch([6]).tokens.tolist()
    batches = [batch_of(tokens), batch_of(tokens, "left", 10), batch_of(tokens, "right", 10)]
    logits = [node_logits(any_model, b, mask, constants.replacements(b), BOS) for b in batches]
    assert_close(logits[1], logits[0], **EXACT)
    assert_close(logits[2], logits[0], **EXACT)
    clean = [scored_logits(any_model, batch) for batch in batches]
    assert_close(clean[1], clean[0], **EXACT)
    assert_close(clean[2], clean[0], **EXACT)


def test_the_bos_is_never_ablated(any_model):
    batch = random_batch([1, 1])
    mask = torch.zeros(2, len(components_of(any_model)), dtype=torch.float64)
    replacements = random_constants(any_model).replacements(batch)
    assert_close(node_logits(any_model, batch, mask, replacements, BOS), scored_logits(any_model, batch), **EXACT)
    ablated = node_logits(any_model, batch, mask, replacements, None)
    assert (ablated - scored_logits(any_model, batch)).abs().max() > 1e-3


def hooks_of(model) -> list:
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in hooks
    ]


def test_the_model_is_untouched_afterwards_and_after_an_exception(any_model):
    batch = random_batch([6, 4])
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    modules = [(name, id(module)) for name, module in any_model.named_modules()]
    clean = any_model(input_ids=batch.tokens).logits
    mask = random_mask(2, len(components_of(any_model)))
    node_logits(any_model, batch, mask, random_constants(any_model).replacements(batch), BOS)

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("inside")

    last = Tap(any_model.get_output_embeddings(), "output", fail)
    with pytest.raises(RuntimeError, match="inside"), tapped([last]):
        node_logits(any_model, batch, mask, random_constants(any_model).replacements(batch), BOS)
    assert not hooks_of(any_model)
    assert modules == [(name, id(module)) for name, module in any_model.named_modules()]
    for name, tensor in any_model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in any_model.parameters())
    assert torch.equal(any_model(input_ids=batch.tokens).logits, clean)


def test_blocks_that_run_again_in_the_backward_pass_change_no_digit(shared_model):
    batch, n = random_batch([9, 6, 4]), len(components_of(shared_model))
    found = []
    for recompute in (False, True):
        mask = random_mask(3, n).requires_grad_()
        replacements = random_replacements(shared_model, 3, 9)
        logits = node_logits(shared_model, batch, mask, replacements, BOS, recompute)
        parts = (mask, replacements.heads, replacements.mlps)
        found.append((logits, *torch.autograd.grad(logits.softmax(-1)[..., :5].sum(), parts)))
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)
    # The forward of a class is seen again, and no hook is left.
    for module in shared_model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_blocks_that_run_again_keep_less_memory():
    model, batch = tiny_model("llama"), random_batch([12] * 8)
    peaks = []
    for recompute in (False, True):
        mask = random_mask(8, len(components_of(model))).requires_grad_()
        replacements = random_constants(model, requires_grad=True).replacements(batch)
        with LiveBytes() as live:
            before = live.now
            logits = node_logits(model, batch, mask, replacements, BOS, recompute)
            peaks.append(live.now - before)
        logits.sum().backward()
    assert peaks[1] < 0.5 * peaks[0]


def test_a_block_that_fails_leaves_no_trace():
    model, batch = tiny_model("gpt2"), random_batch([5])

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("in a tap")

    inside, before = find_parts(model).mlps[1], scored_logits(model, batch)
    with pytest.raises(RuntimeError, match="in a tap"):
        scored_logits(model, batch, [Tap(inside, "output", fail)], recompute=True)
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    assert torch.equal(scored_logits(model, batch), before)
