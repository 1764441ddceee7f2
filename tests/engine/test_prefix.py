"""Circuits that share their clean prefix against circuits that are run whole."""

import pytest
import torch
from torch.testing import assert_close

from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import copies_and_clean_logits, copies_logits, masked_logits
from oa_train.engine.prefix import prefix_logits, saved_share
from oa_train.engine.values import Values
from oa_train.models.hooks import Tap, tapped
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import SITE_KINDS, SiteKind
from tests.builders import random_batch, random_constants, random_values, tiny_model, traces, with_spans
from tests.engine.selections import SPANNED, every_kind, selection
from tests.precision import WithoutSinglePrecision

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def circuits(level: Nodes, *ablated: tuple[str, ...]) -> torch.Tensor:
    return torch.stack([~level.selected(patterns) for patterns in ablated])


def each_whole(model, batch, level: Nodes, masks: torch.Tensor, values) -> torch.Tensor:
    """Logits of all circuits by rows that are run from the first block to the last."""
    rows = masks.double().repeat_interleave(len(batch), dim=0)
    return masked_logits(model, batch.repeat(len(masks)), level, rows, values).view(len(masks), len(batch), 1, -1)


def assert_prefix(model, batch, level: Nodes, masks: torch.Tensor, values, leaves: list[torch.Tensor]) -> None:
    shared, whole = prefix_logits(model, batch, level, masks, values), each_whole(model, batch, level, masks, values)
    assert_close(shared.clean, scored_logits(model, batch), **EXACT)
    assert_close(shared.ablated, whole, **EXACT)
    weights = torch.linspace(-1, 1, whole.numel(), dtype=torch.float64).view_as(whole)
    gradients = [
        torch.autograd.grad((logits * weights).sum(), leaves, materialize_grads=True)
        for logits in (shared.ablated, whole)
    ]
    assert any((gradient != 0).any() for gradient in gradients[0])
    for of_shared, of_whole in zip(*gradients, strict=True):
        assert_close(of_shared, of_whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("lengths", "side"), [([7, 5], "left"), ([7, 5], "right"), ([6], "left"), ([5, 5], "left")])
def test_circuits_of_different_layers_are_each_alone_in_value_and_gradient(any_model, lengths, side):
    batch, level = random_batch(lengths, side), Nodes.of(any_model.config, ["embedding", "residual", "heads", "mlp"])
    masks = circuits(level, ("m2",), ("a0.h1", "m2"), ("r3",), (), ("a1", "m1"), ("input",), ("m0", "a2.h3"))
    values = random_values(level, len(lengths) * len(masks), max(lengths))
    assert_prefix(any_model, batch, level, masks, values, list(values.values()))


@pytest.mark.parametrize("lengths", [[6], [5, 7], [4, 4, 4]])
def test_units_of_every_kind_and_spans_may_be_ablated(archetype, lengths):
    batch = with_spans(random_batch(lengths, "left"), s=(2, 2))
    level, generator = selection(archetype, SPANNED), torch.Generator().manual_seed(3)
    masks = torch.rand(4, len(level), generator=generator) > 0.1
    by_unit = circuits(level, ("tokens@s",), ("f2.*",), ("a2.h1@-1",), ("m1@s",), ("m0.n7", "a1"))
    masks = torch.cat([masks, by_unit])
    constants = random_constants(level, requires_grad=True)
    assert_prefix(archetype, batch, level, masks, constants.replacements(batch), list(constants.tables.values()))


@pytest.mark.parametrize("path", ["input_layernorm", "self_attn.q_proj"])
def test_a_kind_of_site_that_attention_reads_is_ablated_in_its_own_layer(path, monkeypatch):
    """One that is registered from outside, at the norm in front of attention or inside of it."""
    kind = SiteKind(
        "reads",
        "x{layer}",
        lambda sizes: range(sizes.n_layers),
        lambda sizes: (1, sizes.d_model),
        lambda parts, layer: (parts.blocks[layer].get_submodule(path), "input"),
    )
    monkeypatch.setitem(SITE_KINDS, "reads", kind)
    model, batch = tiny_model("llama"), random_batch([6, 4], "left")
    level = Nodes.of(model.config, ["heads", "reads"])
    masks = circuits(level, ("x2",), ("x1",), ("a2.h1",), ("a1", "x2"))
    values = random_values(level, 2 * len(masks), 6)
    with WithoutSinglePrecision():
        assert_prefix(model, batch, level, masks, values, list(values.values()))
        assert saved_share(level, masks) > 0
    clean = prefix_logits(model, batch, level, masks, values)
    assert (clean.ablated[0] - clean.clean).abs().max() > 1e-6


def test_the_blocks_see_fewer_rows(archetype):
    batch, level = random_batch([6, 4]), Nodes.of(archetype.config)
    masks = circuits(level, *[(name,) for name in level.names])
    values = random_constants(level).replacements(batch)

    parts = find_parts(archetype)

    def rows_seen(run) -> tuple[int, int]:
        """By blocks, and where heads leave attention."""
        in_blocks, in_attention = list[int](), list[int]()
        taps = [Tap(block, "output", lambda hidden: in_blocks.append(len(hidden))) for block in parts.blocks]
        # Attached before rows join there.
        taps += [Tap(part, "input", lambda heads: in_attention.append(len(heads))) for part in parts.attention_outputs]
        with tapped(taps):
            run()
        return sum(in_blocks), sum(in_attention)

    shared = rows_seen(lambda: prefix_logits(archetype, batch, level, masks, values))
    whole = rows_seen(lambda: each_whole(archetype, batch, level, masks, values))
    # Five circuits join in each layer, after its attention, beside the clean rows; whole they go through all three.
    assert shared == (2 * (6 + 11 + 16), 2 * (1 + 6 + 11))
    assert whole == (2 * 3 * 15, 2 * 3 * 15)


def test_values_of_a_row_are_copied_once(archetype, monkeypatch):
    """Not for every layer: values by row and position, as of other prompts, are as large as all activations."""
    batch, level = random_batch([6, 4]), Nodes.of(archetype.config)
    masks = circuits(level, *[(name,) for name in level.names])
    values, copied, rows = random_values(level, 2 * len(masks), 6), [], Values.rows
    monkeypatch.setattr(Values, "rows", lambda self, numbers: copied.extend(self) or rows(self, numbers))
    prefix_logits(archetype, batch, level, masks, values)
    assert sorted(copied) == sorted(level.sites)


def test_the_model_is_untouched_afterwards_and_after_an_exception(archetype):
    batch, level = random_batch([6, 4]), every_kind(archetype)
    masks, values = circuits(level, ("m0.n3",), ("a2",)), random_constants(level).replacements(batch)
    before, clean = traces(archetype), scored_logits(archetype, batch)
    prefix_logits(archetype, batch, level, masks, values)

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), tapped([Tap(find_parts(archetype).mlps[2], "output", fail)]):
        prefix_logits(archetype, batch, level, masks, values)
    assert traces(archetype) == before
    assert torch.equal(scored_logits(archetype, batch), clean)


def test_circuits_share_a_prefix_where_that_saves_work(archetype, monkeypatch):
    batch, level = random_batch([5, 7]), Nodes.of(archetype.config)
    values, shared = random_values(level, 1, 7), []
    monkeypatch.setattr(
        "oa_train.engine.levels.prefix_logits", lambda *args: shared.append(len(args[3])) or prefix_logits(*args)
    )
    late = circuits(level, ("m2",), ("a2.h1",), ("m1",), ("a1.h0",))
    early = circuits(level, ("m0",), ("a0.h1", "m2"))
    # Of three blocks the late circuits skip two, two, one and one; the clean rows take three.
    assert saved_share(level, late) == pytest.approx(6 / 12 - 1 / 4)
    assert saved_share(level, early) < 0
    for masks in (late, early):
        whole = each_whole(archetype, batch, level, masks, values)
        assert_close(copies_logits(archetype, batch, level, masks, values).view_as(whole), whole, **EXACT)
        logits, clean = copies_and_clean_logits(archetype, batch, level, masks, values)
        assert_close(logits.view_as(whole), whole, **EXACT)
        assert_close(clean, scored_logits(archetype, batch), **EXACT)
        assert not clean.requires_grad
    assert shared == [4, 4]
