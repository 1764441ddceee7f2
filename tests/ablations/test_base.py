"""Replacements laid out for copies of a batch."""

import pytest
import torch

from oa_train.ablations.base import replacements_of_copies
from oa_train.engine.values import Values
from oa_train.models.selection import Nodes
from tests.builders import random_batch, random_constants, random_values, tiny_model, with_spans


@pytest.fixture(scope="module")
def level():
    return Nodes.of(tiny_model("llama").config)


def no_run(batch):
    raise AssertionError("constants need no run of the model")


def at_tokens(values: Values, level: Nodes, n_rows: int, width: int) -> list[torch.Tensor]:
    """What every token gets, for each site and span."""
    return [values.at(site, span).expand(n_rows, width, -1, -1) for site in level.sites for span in level.spans]


def assert_each_alone(level: Nodes, batch, sets) -> None:
    n, width = batch.tokens.shape
    together = replacements_of_copies(sets, batch, len(sets), no_run)
    laid_out = at_tokens(together, level, n * len(sets), width)
    for number, constants in enumerate(sets):
        alone = at_tokens(constants.replacements(batch), level, n, width)
        for of_all, expected in zip(laid_out, alone, strict=True):
            assert torch.equal(of_all[n * number : n * (number + 1)], expected)


@pytest.mark.parametrize("n_positions", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_several_constants_are_each_alone(level, side, n_positions):
    assert_each_alone(level, random_batch([6, 3], side), [random_constants(level, n_positions, n) for n in range(3)])


def test_pooled_constants_stand_beside_others_that_differ_by_position(level):
    sets = [random_constants(level, n_positions, seed) for seed, n_positions in enumerate((1, 4, 6))]
    assert_each_alone(level, random_batch([6, 3], "left"), sets)


def test_constants_of_spans_stand_side_by_side():
    spanned = Nodes.of(tiny_model("llama").config, ["mlp", "heads"], ["m1@s", "a0.h1@-1", "m2@t"])
    batch = with_spans(random_batch([6, 5], "left"), s=(2, 3), t=(1, 2))
    assert_each_alone(spanned, batch, [random_constants(spanned, seed=seed) for seed in range(3)])
    assert_each_alone(spanned, batch, [random_constants(spanned, 3, seed) for seed in range(2)])


@pytest.mark.parametrize("n_positions", [1, 4])
def test_one_ablation_serves_all_copies(level, n_positions):
    batch, constants = random_batch([6, 3]), random_constants(level, n_positions)
    together = replacements_of_copies([constants], batch, 3, no_run)
    expected = constants.replacements(batch.repeat(3))
    for values, of_copies in zip(at_tokens(together, level, 6, 6), at_tokens(expected, level, 6, 6), strict=True):
        assert torch.equal(values, of_copies)


def test_repeated_values_follow_the_rows_of_a_repeated_batch(level):
    values = random_values(level, 2, 5)
    for site, repeated in values.repeat(3).items():
        for row in range(6):
            assert torch.equal(repeated[row], values[site][row % 2])
    pooled = values.mapped(lambda tensor: tensor[:1])
    for site, repeated in pooled.repeat(3).items():
        assert repeated is pooled[site]
    assert values.repeat(1) is values
