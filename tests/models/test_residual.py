"""Projections and norms taken apart, against the modules that they are parts of."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from oa_train.models.parts import find_parts
from oa_train.models.residual import (
    NormWeights,
    find_residual_parts,
    head_weights,
    is_layer_norm,
    rms_norm_scale,
    weight_and_bias,
)


def vectors(model, width: int | None = None) -> torch.Tensor:
    shape = 2, 5, width or find_parts(model).dimensions.d_model
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_readers_with_equal_inputs_are_the_projections(any_model):
    inputs = vectors(any_model)
    for readers in find_residual_parts(any_model).attention:
        outputs = [module(inputs).movedim(-1, 0) for module in readers.modules]
        biases = [weight_and_bias(module)[1] for module in readers.modules]
        zeros = [output.new_zeros(len(output)) for output in outputs]
        added = readers.by_reader([z if bias is None else bias for bias, z in zip(biases, zeros, strict=True)])
        rows = zip(readers.by_reader(outputs), readers.weights(), added, readers.counts, strict=True)
        for expected, weight, bias, count in rows:
            assert len(weight) == count
            projected = torch.einsum("rpd,ked->kerp", inputs, weight) + bias[..., None, None]
            assert_close(projected, expected, rtol=0, atol=1e-12)


def test_a_gain_is_multiplied_into_copies_of_the_weights(any_model):
    readers = find_residual_parts(any_model).attention[1]
    gain, before = vectors(any_model)[0, 0], [weight.clone() for weight in readers.weights()]
    scaled = readers.weights_times(gain, torch.empty(readers.n_weights, dtype=torch.float64))
    for product, weight, own in zip(scaled, before, readers.weights(), strict=True):
        assert_close(product, weight * gain, rtol=0, atol=0)
        assert torch.equal(own, weight)


def test_heads_write_the_output_of_their_projection_without_its_bias(any_model):
    sizes = find_parts(any_model).dimensions
    projection = find_parts(any_model).attention_outputs[1]
    values = vectors(any_model, sizes.n_heads * sizes.d_head)
    by_head = values.unflatten(-1, (sizes.n_heads, sizes.d_head))
    written = torch.einsum("rphe,hed->rpd", by_head, head_weights(projection, sizes.n_heads))
    bias = weight_and_bias(projection)[1]
    assert_close(written if bias is None else written + bias, projection(values), rtol=0, atol=1e-12)


def test_norms_compute_what_their_weights_say(any_model):
    inputs = vectors(any_model)
    parts = find_residual_parts(any_model)
    norms = [readers.norm for readers in parts.attention if readers.norm is not None]
    for norm in (*norms, *parts.post_norms, find_parts(any_model).final_norm):
        weights = NormWeights.of(norm)
        centred = inputs - inputs.mean(dim=-1, keepdim=True) if is_layer_norm(norm) else inputs
        output = centred * weights.factor(centred) * (1 if weights.gain is None else weights.gain)
        assert_close(output if weights.bias is None else output + weights.bias, norm(inputs), rtol=1e-12, atol=1e-12)
        if not is_layer_norm(norm):
            assert_close(rms_norm_scale(norm, inputs) * inputs, norm(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("norm", "centred"), [(nn.LayerNorm(4), True), (nn.RMSNorm(4, eps=1e-6), False)])
def test_norms_of_torch_are_told_apart(norm, centred):
    assert is_layer_norm(norm) == centred
    inputs = torch.tensor([1.0, 2.0, 3.0, 5.0])
    assert_close(
        norm(inputs),
        (inputs - (inputs.mean() if centred else 0))
        * NormWeights.of(norm).factor(inputs - (inputs.mean() if centred else 0)),
    )
