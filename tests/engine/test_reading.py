"""Values of units against plain hooks, prompt by prompt."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from oa_train import Circuit, Constants, ablated
from oa_train.engine.forward import model_inputs, scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.engine.nodes import node_taps
from oa_train.engine.reading import read_values
from oa_train.models.families import check_family
from oa_train.models.hooks import Tap, replaced_forwards, tapped
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from tests.builders import (
    random_batch,
    random_constants,
    random_dictionary,
    random_mask,
    random_values,
    tiny_model,
    traces,
)
from tests.engine.selections import plain_kinds

EXACT = {"rtol": 0, "atol": 1e-12}


def read_alone(model, tokens: torch.Tensor) -> dict[Site, torch.Tensor]:
    """Values [position, width] at every site of one unpadded prompt, by hooks of our own."""
    family = check_family(model.config.model_type)
    blocks = model.get_submodule(family.blocks)
    read: dict[Site, torch.Tensor] = {}

    def at_input(module: torch.nn.Module, site: Site):
        return module.register_forward_pre_hook(lambda _, args: read.update({site: args[0].view(len(tokens), -1)}))

    def at_output(module: torch.nn.Module, site: Site):
        def hook(_: torch.nn.Module, __: tuple, output: Any) -> None:
            # gpt-oss adds its router's scores.
            read[site] = (output[0] if isinstance(output, tuple) else output).view(len(tokens), -1)

        return module.register_forward_hook(hook)

    handles = [
        at_output(model.get_input_embeddings(), Site("tokens")),
        at_input(blocks[0], Site("embedding")),
        at_input(model.get_submodule(family.final_norm), Site("residual", len(blocks))),
    ]
    for layer, block in enumerate(blocks):
        projection = block.get_submodule(family.attention_output)
        attention = block.get_submodule(family.attention_post_norm) if family.attention_post_norm else projection
        handles += [
            at_input(projection, Site("heads", layer)),
            at_output(attention, Site("attention", layer)),
            at_output(block.get_submodule(family.mlp), Site("mlp", layer)),
        ]
        handles += [at_input(block, Site("residual", layer))] if layer else []
        if family.down_projection:
            handles.append(at_input(block.get_submodule(family.down_projection), Site("neurons", layer)))
    model(input_ids=tokens.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return read


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_equal_plain_hooks_on_each_prompt_alone(any_model, side):
    batch, level = random_batch([8, 5, 3], side), Nodes.of(any_model.config, plain_kinds(any_model))
    before = traces(any_model)
    values = read_values(any_model, batch, level)
    assert traces(any_model) == before
    for row, real in enumerate(batch.attention_mask):
        expected = read_alone(any_model, batch.tokens[row][real])
        assert set(values) == set(expected)
        for site, (n_units, width) in level.sites.items():
            assert values[site].shape == (3, 8, n_units, width)
            assert not values[site].requires_grad
            assert_close(values[site][row, real].flatten(1), expected[site], **EXACT)


def test_features_are_the_code_of_their_site(archetype):
    batch, dictionaries = random_batch([6, 4], "left"), [random_dictionary(site) for site in ("m0", "r1", "a2")]
    features = read_values(archetype, batch, Nodes.of(archetype.config, ["features"], (), dictionaries))
    whole = read_values(archetype, batch, Nodes.of(archetype.config, plain_kinds(archetype)))
    for dictionary, site in zip(
        dictionaries, (Site("mlp", 0), Site("residual", 1), Site("attention", 2)), strict=True
    ):
        code = (whole[site].squeeze(2) @ dictionary.w_enc + dictionary.b_enc).relu()
        assert_close(features[Site("features", site.layer)].squeeze(-1), code, **EXACT)


def test_values_of_another_prompt_patched_in_give_that_prompts_logits(common_model):
    # All heads and MLPs taken from a prompt that ends in the same token are the whole of what differs.
    first, second, level = random_batch([6], seed=1), random_batch([6], seed=2), Nodes.of(common_model.config)
    second.tokens[0, -1] = first.tokens[0, -1]
    values, mask = read_values(common_model, second, level), torch.zeros(1, 15, dtype=torch.float64)
    patched = masked_logits(common_model, first, level, mask, values)
    assert_close(patched, scored_logits(common_model, second), **EXACT)
    assert (patched - scored_logits(common_model, first)).abs().max() > 1e-3
    other = random_values(level, 1, 6)
    assert (masked_logits(common_model, first, level, mask, other) - patched).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_scored_logits_are_those_of_hugging_face_at_the_scored_position(archetype, side):
    batch = random_batch([7, 4], side)
    whole = archetype(**model_inputs(batch)).logits
    assert_close(scored_logits(archetype, batch), torch.stack([whole[i, batch.scored[i]] for i in range(2)]), **EXACT)


def note_columns(monkeypatch, modules: list[torch.nn.Module]) -> list[int]:
    """Number of columns in each call of the modules' own forwards, from now on."""
    seen: list[int] = []

    def noting(forward):
        def noted(self, hidden, *args, **kwargs):
            if any(self is module for module in modules):
                seen.append(hidden.shape[1])
            return forward(self, hidden, *args, **kwargs)

        return noted

    for kind in {type(module) for module in modules}:
        monkeypatch.setattr(kind, "forward", noting(kind.forward))
    return seen


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_end_of_the_last_block_runs_from_the_first_scored_column_on(any_model, side, monkeypatch):
    """In value and gradient as if it ran everywhere."""
    batch, level, parts = random_batch([7, 6, 5], side), Nodes.of(any_model.config), find_parts(any_model)
    mask, at_boundary, results, body = random_mask(3, len(level)), [], [], parts.family.mlp_body
    ends = [parts.attention_outputs[-1], *([parts.blocks[-1].get_submodule(body)] if body else [])]
    seen = note_columns(monkeypatch, ends)
    for whole in (False, True):
        constants = random_constants(level, requires_grad=True)
        taps = node_taps(any_model, level, mask, constants.replacements(batch), batch.layout)
        inputs = [Tap(module, "input", lambda hidden: at_boundary.append(hidden.shape[1])) for module in ends]
        logits = scored_logits(any_model, batch, [*taps, *inputs], whole=whole)
        gradients = torch.autograd.grad(logits.square().sum(), [*constants.tables.values()])
        results.append((logits.detach(), *gradients))
    for trimmed, full in zip(*results, strict=True):
        assert_close(trimmed, full, **EXACT)
    assert seen == [7 - batch.scored_from] * len(ends) + [7] * len(ends)
    # Functions attached to the modules see every column either way.
    assert at_boundary == [7] * 2 * len(ends)


def test_a_module_runs_everywhere_where_a_function_inside_reads_it(archetype):
    batch, parts, widths = random_batch([7, 6], "left"), find_parts(archetype), []
    inside = Tap(parts.down_projections[-1], "input", lambda hidden: widths.append(hidden.shape[1]))
    logits = scored_logits(archetype, batch, [inside])
    assert widths == [7]
    assert_close(logits, scored_logits(archetype, batch), **EXACT)


@pytest.mark.parametrize(
    "where", ["mlp", "block", "final norm", "body", "unembedding", "forward", "tapped", "ablated"]
)
def test_the_last_block_runs_everywhere_where_something_else_is_attached(archetype, where, monkeypatch):
    batch, parts, level = random_batch([7, 6], "left"), find_parts(archetype), Nodes.of(archetype.config, ["neurons"])
    clean = scored_logits(archetype, batch)
    seen = note_columns(monkeypatch, [parts.attention_outputs[-1]])
    modules = {
        "mlp": parts.mlps[-1],
        "block": parts.blocks[-1],
        "final norm": parts.final_norm,
        "body": archetype.base_model,
        "unembedding": parts.unembedding,
    }
    if where in modules:
        handle = modules[where].register_forward_hook(lambda _, __, output: None)
        logits = scored_logits(archetype, batch)
        handle.remove()
    elif where == "forward":
        with replaced_forwards([(parts.blocks[-1], parts.blocks[-1].forward)]):
            logits = scored_logits(archetype, batch)
    elif where == "tapped":
        with tapped([Tap(parts.mlps[-1], "output", lambda _: None)]):
            logits = scored_logits(archetype, batch)
    else:
        with ablated(archetype, Circuit.from_patterns(level, ["*"]), Constants.zeros(level)):
            logits = scored_logits(archetype, batch)
    assert seen == [7]
    assert_close(logits, clean, **EXACT)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_router_logits_that_a_configuration_asks_for_are_left_out(family):
    model, batch = tiny_model(family), random_batch([7, 6], "left")
    expected = scored_logits(model, batch)
    model.config.output_router_logits = True
    assert_close(scored_logits(model, batch), expected, **EXACT)


def test_inputs_name_mask_and_positions_only_with_padding():
    plain = model_inputs(random_batch([5, 5]))
    assert plain.keys() == {"input_ids", "use_cache"}
    padded = model_inputs(random_batch([5, 3], "left"))
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert padded["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
