"""Replacements laid out for copies of a batch."""

import pytest
import torch

from oa_train.ablations.base import SourceValues, replacements_of_copies
from tests.builders import random_batch, random_constants, random_replacements, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def no_run(batch):
    raise AssertionError("constants need no run of the model")


@pytest.mark.parametrize("n_positions", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_several_constants_are_each_alone(model, side, n_positions):
    batch = random_batch([6, 3], side)
    sets = [random_constants(model, n_positions, seed) for seed in range(3)]
    together = replacements_of_copies(sets, batch, 3, no_run)
    assert together.heads.shape[1] == together.mlps.shape[1] == 6
    for number, one in enumerate(sets):
        alone = one.replacements(batch)
        rows = slice(2 * number, 2 * number + 2)
        assert torch.equal(together.heads[:, rows], alone.heads.expand_as(together.heads[:, rows]))
        assert torch.equal(together.mlps[:, rows], alone.mlps.expand_as(together.mlps[:, rows]))


def test_pooled_constants_stand_beside_others_that_differ_by_position(model):
    batch = random_batch([6, 3], "left")
    sets = [random_constants(model, n_positions, seed) for seed, n_positions in enumerate((1, 4, 6))]
    together = replacements_of_copies(sets, batch, 3, no_run)
    for number, one in enumerate(sets):
        alone, rows = one.replacements(batch), slice(2 * number, 2 * number + 2)
        assert torch.equal(together.heads[:, rows], alone.heads.expand_as(together.heads[:, rows]))
        assert torch.equal(together.mlps[:, rows], alone.mlps.expand_as(together.mlps[:, rows]))


@pytest.mark.parametrize("n_positions", [1, 4])
def test_one_ablation_serves_all_copies(model, n_positions):
    batch = random_batch([6, 3])
    one = random_constants(model, n_positions)
    together = replacements_of_copies([one], batch, 3, no_run)
    expected = one.replacements(batch.repeat(3))
    assert torch.equal(together.heads, expected.heads)
    assert torch.equal(together.mlps, expected.mlps)


def test_repeated_values_follow_the_rows_of_a_repeated_batch(model):
    values = random_replacements(model, 2, 5)
    repeated = values.repeat(3)
    for row in range(6):
        assert torch.equal(repeated.heads[:, row], values.heads[:, row % 2])
        assert torch.equal(repeated.mlps[:, row], values.mlps[:, row % 2])
        assert torch.equal(repeated.inputs[:, row], values.inputs[:, row % 2])
    pooled = SourceValues(*(one[:, :1] for one in values.tensors()))
    assert pooled.repeat(3) is pooled
