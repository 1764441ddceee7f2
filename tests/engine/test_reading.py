"""Values of components against plain hooks, prompt by prompt."""

import pytest
import torch
from torch.testing import assert_close

from oa_train.engine.forward import model_inputs, scored_logits
from oa_train.engine.nodes import node_logits
from oa_train.engine.reading import source_values
from oa_train.models.families import check_family
from tests.builders import BOS, TINY_CONFIGS, random_batch, random_replacements

EXACT = {"rtol": 0, "atol": 1e-12}


def values_alone(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Head values [layer, position, head, d_head] and MLP outputs of one unpadded prompt."""
    family = check_family(model.config.model_type)
    heads, mlps, handles = [], [], []
    for block in model.get_submodule(family.blocks):
        handles += [
            block.get_submodule(family.attention_output).register_forward_pre_hook(
                lambda _, args: heads.append(args[0][0])
            ),
            block.get_submodule(family.mlp).register_forward_hook(
                lambda _, __, output: mlps.append(output.view(len(tokens), -1))
            ),
        ]
    model(input_ids=tokens.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return torch.stack(heads).view(3, len(tokens), 4, -1), torch.stack(mlps)


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_equal_plain_hooks_on_each_prompt_alone(any_model, side):
    batch = random_batch([8, 5, 3], side)
    values = source_values(any_model, batch)
    d_head = TINY_CONFIGS[any_model.config.model_type].get("head_dim", 8)
    assert values.heads.shape == (3, 3, 8, 4, d_head)
    assert values.mlps.shape == (3, 3, 8, 32)
    for row in range(3):
        real = batch.attention_mask[row]
        heads, mlps = values_alone(any_model, batch.tokens[row][real])
        assert_close(values.heads[:, row][:, real], heads, **EXACT)
        assert_close(values.mlps[:, row][:, real], mlps, **EXACT)


def test_values_carry_no_gradients_and_leave_no_hooks(any_model):
    values = source_values(any_model, random_batch([4]))
    assert not values.heads.requires_grad
    assert not values.mlps.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in any_model.modules())


def test_values_of_another_prompt_patched_in_give_that_prompts_logits(any_model):
    # All heads and MLPs taken from a prompt that ends in the same token are the whole of what differs.
    first = random_batch([6], seed=1)
    second = random_batch([6], seed=2)
    second.tokens[0, -1] = first.tokens[0, -1]
    values = source_values(any_model, second)
    mask = torch.zeros(1, 15, dtype=torch.float64)
    patched = node_logits(any_model, first, mask, values, BOS)
    assert_close(patched, scored_logits(any_model, second), **EXACT)
    assert (patched - scored_logits(any_model, first)).abs().max() > 1e-3
    other = random_replacements(any_model, 1, 6)
    assert (node_logits(any_model, first, mask, other, BOS) - patched).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_scored_logits_are_those_of_hugging_face_at_the_scored_position(any_model, side):
    batch = random_batch([7, 4], side)
    whole = any_model(**model_inputs(batch)).logits
    assert_close(scored_logits(any_model, batch), torch.stack([whole[i, batch.scored[i]] for i in range(2)]), **EXACT)


def test_inputs_name_mask_and_positions_only_with_padding():
    plain = model_inputs(random_batch([5, 5]))
    assert plain.keys() == {"input_ids", "use_cache"}
    padded = model_inputs(random_batch([5, 3], "left"))
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert padded["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
