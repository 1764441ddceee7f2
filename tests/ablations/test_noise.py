"""Noise: its distribution, and that a prompt's draw depends on the prompt's number and length alone."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.base import SourceValues
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_logits
from oa_train.ablations.noise import NoiseAblation
from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.models.families import Dimensions
from tests.builders import BOS, batch_of, random_batch, random_constants, small_ioi, tiny_model, widened

LENGTHS = [8, 5, 3, 8, 6]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def noise_of(model, n_positions: int = 1, seed: int = 0) -> NoiseAblation:
    spread = random_constants(model, n_positions, seed=11)
    spread = replace(spread, heads=spread.heads.abs(), mlps=spread.mlps.abs())
    return NoiseAblation(random_constants(model, n_positions, seed=10), spread, seed)


def no_run(batch):
    raise AssertionError("noise needs no run of the model")


def drawn(noise: NoiseAblation, batch: Batch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Heads and MLPs at the real tokens of each prompt, by its number."""
    values = noise.replacements(batch, no_run)
    assert values.heads.shape[1:3] == values.mlps.shape[1:3] == batch.tokens.shape
    rows = zip(batch.example_ids.tolist(), batch.attention_mask, strict=True)
    return {number: (values.heads[:, i, real], values.mlps[:, i, real]) for i, (number, real) in enumerate(rows)}


def same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("n_positions", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_draw_depends_on_no_other_prompt_and_no_padding(model, side, n_positions):
    noise = noise_of(model, n_positions)
    expected = drawn(noise, random_batch(LENGTHS, "right"))
    batch = random_batch(LENGTHS, side)
    for other in (batch, widened(batch, side, 7), batch.rows(slice(1, 4)), batch.rows(slice(2, 3))):
        for number, found in drawn(noise, other).items():
            assert same(found, expected[number])
    reversed_rows = batch._map(lambda tensor: tensor.flip(0))
    for number, found in drawn(noise, reversed_rows).items():
        assert same(found, expected[number])


def test_copies_of_a_prompt_get_the_same_noise(model):
    batch, noise = random_batch(LENGTHS), noise_of(model)
    once, thrice = noise.replacements(batch, no_run).repeat(3), noise.replacements(batch.repeat(3), no_run)
    assert torch.equal(once.heads, thrice.heads)
    assert torch.equal(once.mlps, thrice.mlps)


def test_noise_carries_nothing_of_the_prompt(model):
    noise = noise_of(model, 4)
    first, second = random_batch(LENGTHS, seed=1), random_batch(LENGTHS, seed=2)
    assert (first.tokens != second.tokens).sum() > 10
    for one, other in zip(drawn(noise, first).values(), drawn(noise, second).values(), strict=True):
        assert same(one, other)


def test_numbers_and_seeds_each_change_the_draw(model):
    batch = random_batch([8, 8])
    first, second = drawn(noise_of(model), batch).values()
    (third, _) = drawn(noise_of(model, seed=1), batch).values()
    for other in (second, third):
        assert (first[0] != other[0]).all()
        assert (first[1] != other[1]).all()


def many(model, n_positions: int) -> tuple[SourceValues, Batch]:
    batch = batch_of([[BOS, 5, 6, 7, 8]] * 4000)
    return noise_of(model, n_positions).replacements(batch, no_run), batch


@pytest.mark.parametrize("n_positions", [1, 3])
def test_many_draws_have_the_mean_and_the_spread_that_were_asked_for(model, n_positions):
    values, batch = many(model, n_positions)
    mean, spread = noise_of(model, n_positions)._mean, noise_of(model, n_positions)._spread
    n = len(batch)
    for name in ("heads", "mlps"):
        found = getattr(values, name)
        for position in range(5):
            row = min(position, n_positions - 1)
            centre, width = getattr(mean, name)[:, row], getattr(spread, name)[:, row]
            errors = (found[:, :, position].mean(dim=1) - centre) / (width / n**0.5)
            assert errors.abs().max() < 4
            assert 0.8 < errors.std() < 1.2  # and are not suspiciously near
            errors = (found[:, :, position].std(dim=1) / width - 1) * (2 * n) ** 0.5
            assert errors.abs().max() < 4


def test_layers_positions_heads_and_dimensions_are_drawn_independently(model):
    values, batch = many(model, 1)
    columns = torch.cat([values.heads[:, :, 1:3].flatten(3), values.mlps[:, :, 1:3]], dim=-1)
    columns = columns.permute(1, 0, 2, 3).flatten(1)[:, ::3]
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 5.5 / len(batch) ** 0.5


def test_without_spread_noise_is_mean_ablation(model):
    mean = random_constants(model, 4)
    zeros = Constants.zeros(Dimensions.of(model.config), BOS, 4)
    batch = random_batch(LENGTHS, "left")
    found, expected = NoiseAblation(mean, zeros, 0).replacements(batch, no_run), mean.replacements(batch)
    assert torch.equal(found.heads, expected.heads)
    assert torch.equal(found.mlps, expected.mlps)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_bos_is_left_alone(model, side):
    noise, nothing = noise_of(model), torch.zeros(1, 15).bool()
    only = widened(batch_of([[BOS], [BOS]]), side, 2)
    assert torch.equal(circuit_logits(model, only, nothing, [noise]), scored_logits(model, only))
    other = batch_of([[5], [6]])
    assert (circuit_logits(model, other, nothing, [noise]) - scored_logits(model, other)).abs().max() > 1e-2


def test_prompts_of_a_task_get_different_noise_within_a_batch(model):
    task = small_ioi(n_tokens=18)
    found = list(drawn(noise_of(model), task.batch("test", 0, 3)).values())
    assert not any(same(found[i], found[j]) for i in range(3) for j in range(i))


def test_a_copy_on_another_device_is_the_same(model):
    noise, batch = noise_of(model), random_batch(LENGTHS)
    moved = noise.to("cpu")
    assert moved.bos_token_id == BOS
    assert_close(moved.replacements(batch, no_run).heads, noise.replacements(batch, no_run).heads, rtol=0, atol=0)
