"""Weights that are written by hand do what they say, in every family."""

import pytest
import torch

from oa_train.models.frozen import CausalLM
from oa_train.models.residual import find_residual_parts, head_weights, weight_and_bias
from oa_train.zoo.known.families import gpt2, gpt_neox, llama
from oa_train.zoo.known.weights import HandWrittenWeights

WIDTH, WORDS = 32, ("a", "b", "c")


def model_of(family: str) -> CausalLM:
    sizes = {"n_layers": 2, "n_heads": 4, "n_units": 12, "n_positions": 8}
    if family == "gpt2":
        return gpt2(WIDTH, WORDS, **sizes)
    if family == "gpt_neox":
        return gpt_neox(WIDTH, WORDS, rotated=0.5, base=100.0, **sizes)
    return llama(WIDTH, WORDS, base=100.0, n_groups=2, **sizes)


FAMILIES = ["gpt2", "gpt_neox", "llama"]


def balanced(*shape: int) -> torch.Tensor:
    drawn = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))
    return drawn - drawn.mean(dim=-1, keepdim=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_pass_the_residual_stream_on(family: str) -> None:
    weights = HandWrittenWeights(model_of(family))
    given = 3 * balanced(2, 5)
    for norm in weights._norms():
        torch.testing.assert_close(norm(given), given, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_rectify(family: str) -> None:
    weights = HandWrittenWeights(model_of(family))
    given, reads, writes = balanced(5), torch.eye(WIDTH)[:4], torch.eye(WIDTH)[10:14]
    weights.add_units(1, reads[:3], torch.full((3,), -0.5), writes[:3])
    weights.add_units(1, reads[3:], torch.full((1,), 0.5), 2 * writes[3:])
    expected = torch.zeros(5, WIDTH)
    expected[:, 10:13] = (given[:, :3] - 0.5).relu()
    expected[:, 13] = 2 * (given[:, 3] + 0.5).relu()
    # A smooth gate is off by 0.0047 at the most, next to its bend.
    tolerance = 0.01 if family == "llama" else 1e-6
    torch.testing.assert_close(weights.parts.mlps[1](given), expected, rtol=0, atol=tolerance)
    assert not weights.parts.mlps[0](given).any()


def test_an_mlp_without_room_is_refused() -> None:
    weights = HandWrittenWeights(model_of("gpt2"))
    with pytest.raises(ValueError, match="has 12 units, 13 are asked for"):
        weights.add_units(0, torch.zeros(13, WIDTH), torch.zeros(13), torch.zeros(13, WIDTH))


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_of_single_heads_are_those_that_edges_lead_to(family: str) -> None:
    model = model_of(family)
    weights = HandWrittenWeights(model)
    weights.query(1, 3).weight[2] = torch.arange(WIDTH)
    weights.key(1, 3).bias[2] = 5
    weights.value(1, 2).weight[1] = 7
    readers = find_residual_parts(model).attention[1]
    n, n_kv, group = readers.n_heads, readers.n_kv_heads, 3 // weights.heads_per_group
    inputs = balanced(n + 2 * n_kv, 4)
    biases = [weight_and_bias(module)[1] for module in readers.modules]
    added = [torch.zeros(1) if bias is None else torch.cat(readers.by_reader(biases)).unsqueeze(1) for bias in biases]
    by_reader = inputs @ torch.cat(readers.weights()).transpose(1, 2) + added[0]
    expected = torch.zeros_like(by_reader)
    expected[3, :, 2] = inputs[3] @ torch.arange(WIDTH).float()
    expected[n + group, :, 2] = 5
    value = n + n_kv + 2 // weights.heads_per_group
    expected[value, :, 1] = 7 * inputs[value].sum(dim=-1)
    torch.testing.assert_close(by_reader, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_single_heads_are_what_they_write(family: str) -> None:
    weights = HandWrittenWeights(model_of(family))
    weights.output(0, 2)[:] = balanced(WIDTH // 4).T
    values = torch.randn(1, 3, 4, WIDTH // 4)
    written = torch.einsum("rphe,hed->rhpd", values, head_weights(weights.parts.attention_outputs[0], 4))
    torch.testing.assert_close(written[:, 2], values[:, :, 2] @ balanced(WIDTH // 4))
    assert not written[:, [0, 1, 3]].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_write_is_balanced(family: str) -> None:
    model = model_of(family)
    weights = HandWrittenWeights(model)
    weights.embedding[:] = torch.randn(6, WIDTH)
    weights.output(1, 1)[:] = torch.randn(WIDTH, WIDTH // 4)
    weights.add_units(0, torch.randn(3, WIDTH), torch.randn(3), torch.randn(3, WIDTH))
    if family == "gpt2":
        weights.positions[:] = torch.randn(8, WIDTH)
    weights.balance(WIDTH - 1)
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[0, 3, 4, 5]]), output_hidden_states=True).hidden_states
    assert states[0].abs().max() > 1
    for state in states[:-1]:
        torch.testing.assert_close(state.sum(dim=-1), torch.zeros(1, 4), rtol=0, atol=1e-4)
