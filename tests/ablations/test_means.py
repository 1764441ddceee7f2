"""Streaming means against a plain loop over prompts, tokens and positions."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.means import StreamingMeans
from oa_train.batches import Batch
from oa_train.engine.reading import source_means
from tests.builders import BOS, VOCABULARY, batch_of, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}
PATHS = {
    "gpt2": ("transformer.h", "attn.c_proj"),
    "llama": ("model.layers", "self_attn.o_proj"),
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    return tiny_model(request.param)


def prompts(n: int, shortest: int = 3, longest: int = 8, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator).tolist()
    return [[BOS, *torch.randint(3, VOCABULARY, (n - 1,), generator=generator).tolist()] for n in lengths]


def values_by_hand(model, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Head values [layer, position, width] and MLP outputs of one prompt, with plain hooks."""
    blocks, projection = PATHS[model.config.model_type]
    heads, mlps, handles = [], [], []
    for block in model.get_submodule(blocks):
        handles += [
            block.get_submodule(projection).register_forward_pre_hook(lambda _, args: heads.append(args[0][0])),
            block.mlp.register_forward_hook(lambda _, __, output: mlps.append(output[0])),
        ]
    model(input_ids=torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return torch.stack(heads), torch.stack(mlps)


def sums_by_hand(model, rows: list[list[int]], bos: int | None, ends: list[int] | None = None):
    """Sum and count of the values at each position that counts."""
    heads, mlps, counts = defaultdict(float), defaultdict(float), defaultdict(int)
    for row, end in zip(rows, ends or [len(row) for row in rows], strict=True):
        their_heads, their_mlps = values_by_hand(model, row)
        for position in range(end):
            if position == 0 and row[0] == bos:
                continue
            heads[position] = heads[position] + their_heads[:, position]
            mlps[position] = mlps[position] + their_mlps[:, position]
            counts[position] += 1
    return heads, mlps, counts


def assert_sums(means: StreamingMeans, expected) -> None:
    heads, mlps, counts = expected
    assert {p: n for p, n in enumerate(means.counts.tolist()) if n} == dict(counts)
    for position in range(len(means.counts)):
        if position in counts:
            assert_close(means.heads[:, position].flatten(-2), heads[position], **EXACT)
            assert_close(means.mlps[:, position], mlps[position], **EXACT)
        else:
            assert not means.heads[:, position].any()
            assert not means.mlps[:, position].any()


def assert_same(first: StreamingMeans, second: StreamingMeans) -> None:
    assert first.heads.dtype == first.mlps.dtype == torch.float64
    assert torch.equal(first.counts, second.counts)
    assert_close(first.heads, second.heads, **EXACT)
    assert_close(first.mlps, second.mlps, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [BOS, None])
def test_means_equal_a_loop_over_prompts(model, side, bos):
    rows = prompts(5)
    means = source_means(model, [batch_of(rows[:2], side), batch_of(rows[2:], side, 11)], bos)
    assert_sums(means, sums_by_hand(model, rows, bos))
    assert means.bos_token_id == bos


def test_a_bos_token_later_in_the_prompt_and_another_first_token_count(model):
    rows = [[5, BOS, 6, 7], [BOS, 6, BOS]]
    means = source_means(model, [batch_of(rows)], BOS)
    assert means.counts.tolist() == [1, 2, 2, 1]
    assert_sums(means, sums_by_hand(model, rows, BOS))


def test_tokens_after_the_scored_position_are_left_out(model):
    rows = prompts(2, 7, 7)
    batch = replace(batch_of(rows), scored=torch.tensor([[3], [5]]))
    means = source_means(model, [batch], BOS)
    assert means.counts.tolist() == [0, 2, 2, 2, 1, 1]
    assert_sums(means, sums_by_hand(model, rows, BOS, ends=[4, 6]))


def test_of_several_scored_positions_the_last_one_counts(model):
    rows = prompts(2, 7, 7)
    several = {"answers": torch.full((2, 2, 1), 5), "distractors": torch.full((2, 2, 1), 6)}
    scored, weights = torch.tensor([[1, 3], [5, 5]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    batch = replace(batch_of(rows), scored=scored, weights=weights, **several)
    assert_sums(source_means(model, [batch], BOS), sums_by_hand(model, rows, BOS, ends=[4, 6]))


@pytest.mark.parametrize("n_positions", [1, 3, 12])
def test_spreads_are_standard_deviations_over_tokens(model, n_positions):
    rows = prompts(6, 3, 8, seed=3)
    sums = source_means(model, [batch_of(rows)], BOS)
    found = sums.spread(source_means(model, [batch_of(rows)], BOS, torch.square), n_positions)
    assert found.bos_token_id == BOS
    tokens = [values_by_hand(model, row) for row in rows]
    for number in range(n_positions):
        places = [number] if number < n_positions - 1 else range(number, 12)
        there = [(one, place) for one in tokens for place in places if 0 < place < one[0].shape[1]]
        if not there:
            assert torch.equal(found.heads[:, number], found.heads[:, max(number - 1, 0)])
            continue
        heads, mlps = (torch.stack([one[i][:, place] for one, place in there]).std(0, unbiased=False) for i in (0, 1))
        assert_close(found.heads[:, number].flatten(-2).double(), heads, rtol=1e-6, atol=1e-7)
        assert_close(found.mlps[:, number].double(), mlps, rtol=1e-6, atol=1e-7)


def test_uneven_batches_one_batch_and_merged_halves_agree(model):
    rows = prompts(9, seed=1)
    whole = source_means(model, [batch_of(rows)], BOS)
    parts = [batch_of(rows[:1]), batch_of(rows[1:6]), batch_of(rows[6:])]
    assert_same(source_means(model, parts, BOS), whole)
    assert_same(source_means(model, parts[::-1], BOS), whole)
    first, second = source_means(model, parts[:2], BOS), source_means(model, parts[2:], BOS)
    first.merge(second)
    assert_same(first, whole)
    assert_close(first.table(4).heads, whole.table(4).heads)


def test_merging_with_nothing_changes_nothing(model):
    means = source_means(model, [batch_of(prompts(2))], BOS)
    same = source_means(model, [batch_of(prompts(2))], BOS)
    same.merge(StreamingMeans(BOS))
    assert_same(same, means)
    other = StreamingMeans(BOS)
    other.merge(means)
    assert_same(other, means)


def test_a_batch_of_nothing_but_bos_adds_nothing(model):
    only: Batch = batch_of([[BOS], [BOS]])
    means = source_means(model, [only, batch_of([[BOS, 5, 6]])], BOS)
    assert means.counts.tolist() == [0, 1, 1]


@pytest.mark.parametrize("n_positions", [1, 2, 3, 8, 12])
def test_the_table_pools_the_tail(model, n_positions):
    rows = prompts(5, 3, 8, seed=2)
    heads, mlps, counts = sums_by_hand(model, rows, BOS)
    table = source_means(model, [batch_of(rows)], BOS).table(n_positions)
    assert table.n_positions == table.mlps.shape[1] == n_positions
    assert table.bos_token_id == BOS
    for number in range(n_positions):
        pooled = [number] if number < n_positions - 1 else range(number, 12)
        n = sum(counts[position] for position in pooled if position in counts)
        if n == 0:
            # As the nearest position before it, and zero where there is none.
            assert torch.equal(table.heads[:, number], table.heads[:, max(number - 1, 0)])
            assert torch.equal(table.mlps[:, number], table.mlps[:, max(number - 1, 0)])
            assert bool(table.mlps[:, number].any()) == (number > 0)
            continue
        mean_of_heads = sum(heads[position] for position in pooled if position in counts) / n
        mean_of_mlps = sum(mlps[position] for position in pooled if position in counts) / n
        assert_close(table.heads[:, number].flatten(-2).double(), mean_of_heads, rtol=1e-6, atol=1e-6)
        assert_close(table.mlps[:, number].double(), mean_of_mlps, rtol=1e-6, atol=1e-6)


def test_no_token_no_mean():
    with pytest.raises(ValueError, match="No token was counted"):
        StreamingMeans(BOS).table(1)
