"""Noise: its distribution, and that a prompt's draw depends on the prompt's number and length alone."""

import pytest
import torch

from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_logits
from oa_train.ablations.noise import NoiseAblation
from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.engine.values import Values
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from tests.builders import (
    BOS,
    batch_of,
    random_batch,
    random_constants,
    random_dictionary,
    small_ioi,
    tiny_model,
    widened,
    with_spans,
)

LENGTHS = [8, 5, 4, 8, 6]
# Values of a row's real tokens, by site and span.
Drawn = dict[tuple[Site, str | None], torch.Tensor]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def level(model):
    return Nodes.of(model.config)


@pytest.fixture(scope="module")
def spanned(model):
    kinds = ["tokens", "residual", "heads", "attention", "neurons", "mlp", "features"]
    return Nodes.of(model.config, kinds, ["m1@s", "a0.h2@-1", "r2@s"], [random_dictionary("m1")])


def statistics(level: Nodes, n_positions: int = 1) -> tuple[Constants, Constants]:
    """Centre and width."""
    return random_constants(level, n_positions, seed=10), random_constants(level, n_positions, seed=11).mapped(
        torch.abs
    )


def noise_of(level: Nodes, n_positions: int = 1, seed: int = 0) -> NoiseAblation:
    return NoiseAblation(*statistics(level, n_positions), seed)


def no_run(batch):
    raise AssertionError("noise needs no run of the model")


def drawn(level: Nodes, noise: NoiseAblation, batch: Batch) -> dict[int, Drawn]:
    """What each prompt gets, by its number."""
    values, prompts = noise.replacements(batch, no_run), {}
    for row, (number, real) in enumerate(zip(batch.example_ids.tolist(), batch.attention_mask, strict=True)):
        prompts[number] = {
            (site, span): values.at(site, span)[row, real] for site in level.sites for span in level.spans
        }
    return prompts


def same(first: Drawn, second: Drawn) -> bool:
    return all(torch.equal(values, second[key]) for key, values in first.items())


@pytest.mark.parametrize("n_positions", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_draw_depends_on_no_other_prompt_and_no_padding(spanned, side, n_positions):
    noise = noise_of(spanned, n_positions)
    expected = drawn(spanned, noise, random_batch(LENGTHS, "right"))
    batch = random_batch(LENGTHS, side)
    reversed_rows = batch._map(lambda tensor: tensor.flip(0))
    for other in (batch, widened(batch, side, 7), batch.rows(slice(1, 4)), batch.rows(slice(2, 3)), reversed_rows):
        for number, values in drawn(spanned, noise, other).items():
            assert same(values, expected[number])


def test_copies_of_a_prompt_get_the_same_noise(spanned):
    batch, noise = random_batch(LENGTHS), noise_of(spanned)
    once, thrice = noise.replacements(batch, no_run).repeat(3), noise.replacements(batch.repeat(3), no_run)
    for site in spanned.sites:
        for span in spanned.spans:
            assert torch.equal(once.at(site, span), thrice.at(site, span))


def test_noise_carries_nothing_of_the_prompt(level):
    noise = noise_of(level, 4)
    first, second = random_batch(LENGTHS, seed=1), random_batch(LENGTHS, seed=2)
    assert (first.tokens != second.tokens).sum() > 10
    for values, other in zip(drawn(level, noise, first).values(), drawn(level, noise, second).values(), strict=True):
        assert same(values, other)


def test_numbers_and_seeds_each_change_the_draw(level):
    batch = random_batch([8, 8])
    first, second = drawn(level, noise_of(level), batch).values()
    third, _ = drawn(level, noise_of(level, seed=1), batch).values()
    for other in (second, third):
        assert all((values != other[key]).all() for key, values in first.items())


def test_prompts_of_a_task_get_different_noise_within_a_batch(level):
    prompts = list(drawn(level, noise_of(level), small_ioi(n_tokens=18).batch("test", 0, 3)).values())
    assert not any(same(prompts[i], prompts[j]) for i in range(3) for j in range(i))


def many(level: Nodes, n_positions: int) -> tuple[Values, int]:
    batch = batch_of([[BOS, 5, 6, 7, 8]] * 4000)
    return noise_of(level, n_positions).replacements(batch, no_run), len(batch)


@pytest.mark.parametrize("n_positions", [1, 3])
def test_many_draws_have_the_mean_and_the_spread_that_were_asked_for(level, n_positions):
    (values, n), (mean, spread) = many(level, n_positions), statistics(level, n_positions)
    for site in level.sites:
        for position in range(5):
            row = min(position, n_positions - 1)
            centre, width = mean.tables[site][row], spread.tables[site][row]
            errors = (values[site][:, position].mean(dim=0) - centre) / (width / n**0.5)
            assert errors.abs().max() < 4.5
            assert 0.6 < errors.std() < 1.4  # and are not suspiciously near
            errors = (values[site][:, position].std(dim=0) / width - 1) * (2 * n) ** 0.5
            assert errors.abs().max() < 4.5


def test_each_span_has_a_mean_and_a_spread_of_its_own(model):
    level = Nodes.of(model.config, ["mlp"], ["m1@s", "m1@-1"])
    mean, spread = statistics(level)
    n = 4000
    batch = with_spans(batch_of([[BOS, 5, 6, 7, 8]] * n), s=(2,))
    values = NoiseAblation(mean, spread, 0).replacements(batch, no_run)
    for number, span in enumerate(level.spans):
        for site in level.sites:
            centre, width = mean.tables[site][number], spread.tables[site][number]
            at_span = values.at(site, span)[:, 2]
            assert ((at_span.mean(dim=0) - centre) / (width / n**0.5)).abs().max() < 4.5
            assert ((at_span.std(dim=0) / width - 1) * (2 * n) ** 0.5).abs().max() < 4.5


def test_layers_positions_heads_and_dimensions_are_drawn_independently(level):
    values, n = many(level, 1)
    columns = torch.cat([tensor[:, 1:3].flatten(1) for tensor in values.values()], dim=1)[:, ::3]
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 5.5 / n**0.5


def test_without_spread_noise_is_mean_ablation(spanned):
    mean = random_constants(spanned, 4)
    batch = random_batch(LENGTHS, "left")
    values = NoiseAblation(mean, mean.mapped(torch.zeros_like), 0).replacements(batch, no_run)
    expected = mean.replacements(batch)
    for site in spanned.sites:
        for span in spanned.spans:
            assert torch.equal(values.at(site, span), expected.at(site, span))


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_protected_is_left_alone(model, level, side):
    noise, nothing = noise_of(level), torch.zeros(1, len(level)).bool()
    only = widened(batch_of([[BOS], [BOS]]), side, 2)
    assert torch.equal(circuit_logits(model, only, level, nothing, [noise]), scored_logits(model, only))
    other = batch_of([[5], [6]])
    assert (circuit_logits(model, other, level, nothing, [noise]) - scored_logits(model, other)).abs().max() > 1e-2


def test_a_copy_on_another_device_is_the_same(level):
    noise, batch = noise_of(level), random_batch(LENGTHS)
    for number, values in drawn(level, noise.to("cpu"), batch).items():
        assert same(values, drawn(level, noise, batch)[number])
