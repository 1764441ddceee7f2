"""Every kind of site, alone and all together: against the slow reference, and laws that tie one kind to another."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.constants import Constants, Slots
from oa_train.ablations.prompts import OtherPromptAblation
from oa_train.diagnostics.reference import reference_node_logits
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.engine.nodes import node_taps
from oa_train.engine.reading import read_values
from oa_train.engine.values import Values
from oa_train.errors import ConfigurationError, TaskError
from oa_train.models.dictionaries import Dictionary
from oa_train.models.families import FAMILIES
from oa_train.models.hooks import Tap, tapped
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from tests.builders import (
    batch_of,
    random_batch,
    random_constants,
    random_mask,
    random_values,
    tiny_model,
    traces,
    with_spans,
)
from tests.engine.selections import SELECTIONS, SPANNED, every_kind, selection

EXACT = {"rtol": 0, "atol": 1e-12}
LAYER = 1


def spanned(batch):
    return with_spans(batch, s=(2, 3))


def ones(rows: int, level: Nodes) -> torch.Tensor:
    return torch.ones(rows, len(level), dtype=torch.float64)


def without(level: Nodes, *patterns: str) -> torch.Tensor:
    """A mask of one row that keeps all but some entries."""
    return (~level.selected(patterns)).double().unsqueeze(0)


def projected(projection: torch.nn.Module, vector: torch.Tensor) -> torch.Tensor:
    """A linear map written out; Conv1D holds its weight the other way round."""
    weight = projection.weight if hasattr(projection, "nf") else projection.weight.T
    return vector @ weight + (0 if projection.bias is None else projection.bias)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_all_kept_is_the_model_itself(archetype, name, side):
    batch, level = spanned(random_batch([7, 5], side)), selection(archetype, name)
    logits = masked_logits(archetype, batch, level, ones(2, level), random_values(level, 2, 7))
    for row in range(2):
        alone = archetype(input_ids=batch.tokens[row][batch.attention_mask[row]].unsqueeze(0)).logits[0, -1]
        assert_close(logits[row, 0], alone, **EXACT)


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_reference_agrees_in_value_and_every_gradient(archetype, name):
    batch, level = with_spans(random_batch([4, 5], "left"), s=(1, 2)), selection(archetype, name)
    results = []
    for run in (masked_logits, reference_node_logits):
        mask, values = random_mask(2, len(level)), random_values(level, 2, 5)
        mask[:, 0] = torch.tensor([0.0, 0.3])
        logits = run(archetype, batch, level, mask.requires_grad_(), values)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        leaves = [mask, *values.values()]
        gradients = torch.autograd.grad((logits * weights).sum(), leaves, materialize_grads=True)
        results.append((logits, *gradients))
    assert (results[0][1] != 0).any()
    for fast, slow in zip(*results, strict=True):
        assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SELECTIONS)
def test_padding_left_right_and_none_agree(archetype, name):
    level = selection(archetype, name)
    mask, constants = random_mask(1, len(level)), random_constants(level, positions=3)
    mask[:, 0] = 0.3
    tokens = random_batch([6]).tokens.tolist()
    batches = [
        spanned(batch) for batch in (batch_of(tokens), batch_of(tokens, "left", 9), batch_of(tokens, "right", 9))
    ]
    logits = [masked_logits(archetype, batch, level, mask, constants.replacements(batch)) for batch in batches]
    assert (logits[0] - scored_logits(archetype, batches[0])).abs().max() > 1e-3
    assert_close(logits[1], logits[0], **EXACT)
    assert_close(logits[2], logits[0], **EXACT)


def test_the_model_is_untouched_afterwards_and_after_an_exception(archetype):
    batch, level = spanned(random_batch([7, 5])), selection(archetype, SPANNED)
    before, clean = traces(archetype), scored_logits(archetype, batch)
    values = random_values(level, 2, 7)
    masked_logits(archetype, batch, level, random_mask(2, len(level)), values).sum().backward()

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("inside")

    for recompute in (False, True):
        for module in (find_parts(archetype).mlps[1], archetype.get_output_embeddings()):
            with pytest.raises(RuntimeError, match="inside"), tapped([Tap(module, "output", fail)]):
                masked_logits(archetype, batch, level, random_mask(2, len(level)), values, recompute)
    assert traces(archetype) == before
    assert torch.equal(scored_logits(archetype, batch), clean)


@pytest.mark.parametrize("name", SELECTIONS)
def test_protected_tokens_never_change_at_any_site(archetype, name):
    batch, level, whole = spanned(random_batch([7, 5], "left")), selection(archetype, name), every_kind(archetype)
    clean = read_values(archetype, batch, whole)
    taps = node_taps(archetype, level, 0 * ones(2, level), random_values(level, 2, 7), batch.layout)
    with tapped(taps):
        ablated = read_values(archetype, batch, whole)
    for site in whole.sites:
        assert_close(ablated[site][batch.protected], clean[site][batch.protected], **EXACT)
    last = Site("residual", 3)
    assert (ablated[last][~batch.protected] - clean[last][~batch.protected]).abs().max() > 1e-3


def test_heads_at_constants_are_attention_at_what_they_write_together(archetype):
    batch, parts = random_batch([7, 5], "left"), find_parts(archetype)
    heads, attention = Nodes.of(archetype.config, ["heads"]), Nodes.of(archetype.config, ["attention"])
    constants = random_constants(heads)
    written = projected(parts.attention_outputs[LAYER], constants.tables[Site("heads", LAYER)].flatten())
    if parts.family.post_norms:
        written = parts.attentions[LAYER](written)
    whole = Values({site: written.expand(1, 1, 1, -1) for site in attention.sites})
    by_head = without(heads, f"a{LAYER}").expand(2, -1)
    logits = masked_logits(archetype, batch, heads, by_head, constants.replacements(batch))
    expected = masked_logits(archetype, batch, attention, without(attention, f"a{LAYER}").expand(2, -1), whole)
    assert_close(logits, expected, **EXACT)
    assert (logits - scored_logits(archetype, batch)).abs().max() > 1e-3


def test_neurons_at_constants_are_the_mlp_at_their_down_projection(archetype):
    batch, parts = random_batch([7, 5], "left"), find_parts(archetype)
    neurons, mlps = Nodes.of(archetype.config, ["neurons"]), Nodes.of(archetype.config, ["mlp"])
    constants = random_constants(neurons)
    written = projected(parts.down_projections[LAYER], constants.tables[Site("neurons", LAYER)].flatten())
    if parts.family.post_norms:
        written = parts.mlps[LAYER](written)
    whole = Values({site: written.expand(1, 1, 1, -1) for site in mlps.sites})
    logits = masked_logits(
        archetype, batch, neurons, without(neurons, f"m{LAYER}").expand(2, -1), constants.replacements(batch)
    )
    expected = masked_logits(archetype, batch, mlps, without(mlps, f"m{LAYER}").expand(2, -1), whole)
    assert_close(logits, expected, **EXACT)
    assert (logits - scored_logits(archetype, batch)).abs().max() > 1e-3


def test_a_neuron_at_zero_takes_what_it_writes_out_of_the_mlp(archetype):
    batch, parts = random_batch([7, 5], "left"), find_parts(archetype)
    if parts.family.post_norms:
        pytest.skip("A norm follows the sum over neurons.")
    both = Nodes.of(archetype.config, ["neurons", "mlp"])
    neurons, mlp = Site("neurons", LAYER), Site("mlp", LAYER)
    clean = read_values(archetype, batch, both)
    projection = parts.down_projections[LAYER]
    w_out = (projection.weight if hasattr(projection, "nf") else projection.weight.T)[17]
    less = clean[mlp] - clean[neurons][:, :, 17:18] * w_out
    values = Values({**{site: torch.zeros_like(value) for site, value in clean.items()}, mlp: less})
    logits = masked_logits(archetype, batch, both, without(both, f"m{LAYER}.n17").expand(2, -1), values)
    expected = masked_logits(archetype, batch, both, without(both, f"m{LAYER}").expand(2, -1), values)
    assert_close(logits, expected, **EXACT)
    assert (logits - scored_logits(archetype, batch)).abs().max() > 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_restored_stream_undoes_every_ablation_before_it(archetype, side):
    batch, level = random_batch([7, 5], side), Nodes.of(archetype.config, ["residual", "heads", "mlp", "embedding"])
    itself = OtherPromptAblation(lambda own: own).replacements(batch, partial(read_values, archetype, level=level))
    for layer in (1, 2, 3):
        before = [name for earlier in range(layer) for name in (f"a{earlier}", f"m{earlier}")]
        mask = random_mask(2, len(level), seed=layer)
        mask[:, ~level.selected([*before, "input"])] = 1
        values = random_values(level, 2, 7)
        ablated = masked_logits(archetype, batch, level, mask, values)
        assert (ablated - scored_logits(archetype, batch)).abs().max() > 1e-3
        mask[:, level.index(f"r{layer}")] = 0
        stream = Site("residual", layer)
        restored = Values({**values, stream: itself[stream]})
        assert_close(masked_logits(archetype, batch, level, mask, restored), scored_logits(archetype, batch), **EXACT)


@pytest.mark.parametrize("name", ["r0", "r1", "m1", "a2", "r3"])
def test_features_of_an_identity_dictionary_are_the_dimensions_of_its_site(archetype, name):
    batch, eye, nothing = random_batch([7, 5], "left"), torch.eye(32).double(), torch.zeros(32).double()
    dictionary = Dictionary(name, eye, nothing, eye, nothing, "identity")
    features = Nodes.of(archetype.config, ["features"], (), [dictionary])
    (site,) = features.sites
    values = random_values(features, 2, 7)
    chosen = without(features, f"f{name[1:]}.4", f"f{name[1:]}.9").expand(2, -1)
    logits = masked_logits(archetype, batch, features, chosen, values)
    whole = Nodes.of(archetype.config, ["embedding", "residual", "mlp", "attention"])
    clean = read_values(archetype, batch, whole)
    of_unit = dict(zip(whole.unit_names, whole.sites, strict=True))[name.replace("r0", "input")]
    replaced = torch.where(chosen[0].bool(), clean[of_unit], values[site].detach().transpose(2, 3))
    mask = without(whole, name.replace("r0", "input")).expand(2, -1)
    expected = masked_logits(archetype, batch, whole, mask, Values({**clean, of_unit: replaced}))
    assert_close(logits, expected, **EXACT)
    assert (logits - scored_logits(archetype, batch)).abs().max() > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_span_of_all_unprotected_tokens_is_no_span(archetype, side):
    batch = with_spans(random_batch([7, 5], side), every=range(1, 7))
    plain = every_kind(archetype)
    restricted = Nodes.of(archetype.config, plain.kinds, ["*@every"], plain.dictionaries)
    assert restricted.names == tuple(f"{name}@every" for name in plain.names)
    mask, values = random_mask(2, len(plain)), random_values(plain, 2, 7)
    expected = masked_logits(archetype, batch, plain, mask, values)
    assert_close(masked_logits(archetype, batch, restricted, mask, values), expected, rtol=0, atol=0)


def test_each_span_has_the_constants_of_its_slot(archetype):
    batch = with_spans(random_batch([7, 6], "left"), early=(1, 2), late=(4, 5))
    level = Nodes.of(archetype.config, ["mlp", "heads"], ["m1@early", "m1@late", "a0.h2@late"])
    constants, mask = random_constants(level), random_mask(2, len(level))
    by_hand = {site: torch.zeros(2, 7, *shape, dtype=torch.float64) for site, shape in level.sites.items()}
    for group in level.groups:
        slot = level.spans.index(group.span)
        inside = batch.attention_mask if group.span is None else batch.spans[group.span]
        for unit in group.units or range(level.sites[group.site][0]):
            by_hand[group.site][:, :, unit][inside] = constants.tables[group.site][slot, unit]
    logits = masked_logits(archetype, batch, level, mask, constants.replacements(batch))
    assert_close(logits, masked_logits(archetype, batch, level, mask, Values(by_hand)), **EXACT)
    spans = tuple({"early": "late", "late": "early", None: None}[span] for span in level.spans)
    exchanged = Constants(constants.tables, Slots(1, spans))
    other = masked_logits(archetype, batch, level, 0 * mask, exchanged.replacements(batch))
    logits = masked_logits(archetype, batch, level, 0 * mask, constants.replacements(batch))
    assert (other - logits).abs().max() > 1e-4


def ablating_everything(model, batch, level: Nodes) -> None:
    masked_logits(model, batch, level, 0 * ones(len(batch), level), Constants.zeros(level).replacements(batch))


def test_spans_that_cannot_be_ablated_are_refused():
    model, batch = tiny_model("gpt2"), with_spans(random_batch([7, 5]), s=(2, 3), t=(3, 4), start=(0,), far=(5, 6))
    before = traces(model)
    for patterns, message in (
        (["m1@subject"], "no span 'subject' in these prompts"),
        (["m1@start"], "'start' holds protected tokens only in prompt 0"),
        (["m1@far"], "'far' is empty in prompt 1"),
        (["m1@s", "m1@t"], "'s' and 't' share a token, and both restrict the same unit"),
        (["m1@s", "m1@*"], "no span"),
    ):
        level = Nodes.of(model.config, ["mlp"], patterns)
        with pytest.raises(TaskError, match=message):
            ablating_everything(model, batch, level)
    # Of different units they may.
    ablating_everything(model, batch, Nodes.of(model.config, ["mlp"], ["m1@s", "m2@t"]))
    assert traces(model) == before


def test_a_family_without_a_down_projection_has_no_neurons(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], down_projection=""))
    model, batch = tiny_model("gpt2"), random_batch([5])
    message = "family 'gpt2' have no sites of the kind 'neurons': .* Ablate whole MLPs"
    with pytest.raises(ConfigurationError, match=message):
        ablating_everything(model, batch, Nodes.of(model.config, ["neurons"]))
    with pytest.raises(ConfigurationError, match=message):
        read_values(model, batch, Nodes.of(model.config, ["neurons"]))
    ablating_everything(model, batch, Nodes.of(model.config, ["mlp"]))
