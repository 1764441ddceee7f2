"""Streaming means against a plain loop over prompts, tokens and positions."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.constants import Slots
from oa_train.ablations.means import StreamingMeans, value_sums
from oa_train.engine.reading import read_values
from oa_train.models.selection import Nodes
from tests.builders import BOS, VOCABULARY, batch_of, tiny_model, with_spans

EXACT = {"rtol": 0, "atol": 1e-11}
LONG = Slots(12)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def level(model):
    return Nodes.of(model.config, ["embedding", "heads", "neurons", "mlp"])


def prompts(n: int, shortest: int = 3, longest: int = 8, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator).tolist()
    return [[BOS, *torch.randint(3, VOCABULARY, (n - 1,), generator=generator).tolist()] for n in lengths]


def counted_alone(model, level: Nodes, rows: list[list[int]], ends: list[int] | None = None, bos: int | None = BOS):
    """Values by site of every token that counts, each prompt run alone, by position."""
    tokens = defaultdict(list)
    for row, end in zip(rows, ends or [len(row) for row in rows], strict=True):
        values = read_values(model, batch_of([row]), level)
        for position in range(end):
            if position > 0 or row[0] != bos:
                tokens[position].append({site: value[0, position] for site, value in values.items()})
    return tokens


def assert_sums(sums: StreamingMeans, tokens) -> None:
    """Compare sums that tell all positions apart."""
    assert {p: n for p, n in enumerate(sums.counts.tolist()) if n} == {p: len(of) for p, of in tokens.items()}
    for site, summed in sums.sums.items():
        assert summed.dtype == torch.float64
        for position in range(len(sums.counts)):
            expected = sum((of[site] for of in tokens.get(position, [])), torch.zeros_like(summed[0]))
            assert_close(summed[position], expected, **EXACT)


def assert_same(first: StreamingMeans, second: StreamingMeans) -> None:
    assert torch.equal(first.counts, second.counts)
    assert set(first.sums) == set(second.sums)
    for site, summed in first.sums.items():
        assert_close(summed, second.sums[site], **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sums_equal_a_loop_over_prompts(model, level, side):
    rows = prompts(5)
    sums = value_sums(model, [batch_of(rows[:2], side), batch_of(rows[2:], side, 11)], level, LONG)
    assert_sums(sums, counted_alone(model, level, rows))


def test_a_bos_token_later_in_the_prompt_and_another_first_token_count(model, level):
    rows = [[5, BOS, 6, 7], [BOS, 6, BOS]]
    sums = value_sums(model, [batch_of(rows)], level, LONG)
    assert sums.counts[:4].tolist() == [1, 2, 2, 1]
    assert_sums(sums, counted_alone(model, level, rows))


def test_where_nothing_is_protected_every_token_counts(model, level):
    rows = prompts(3)
    batch = batch_of(rows)
    unprotected = replace(batch, protected=torch.zeros_like(batch.protected))
    assert_sums(value_sums(model, [unprotected], level, LONG), counted_alone(model, level, rows, bos=None))


def test_tokens_after_the_last_scored_position_are_left_out(model, level):
    rows = prompts(2, 7, 7)
    expected = counted_alone(model, level, rows, ends=[4, 6])
    single = replace(batch_of(rows), scored=torch.tensor([[3], [5]]))
    assert_sums(value_sums(model, [single], level, LONG), expected)
    several = replace(
        batch_of(rows),
        scored=torch.tensor([[1, 3], [5, 5]]),
        weights=torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
        answers=torch.full((2, 2, 1), 5),
        distractors=torch.full((2, 2, 1), 6),
    )
    assert_sums(value_sums(model, [several], level, LONG), expected)


@pytest.mark.parametrize("n_positions", [1, 2, 3, 12])
def test_means_and_spreads_pool_the_tail(model, level, n_positions):
    rows, slots = prompts(6, 3, 8, seed=3), Slots(n_positions)
    tokens = counted_alone(model, level, rows)
    sums = value_sums(model, [batch_of(rows)], level, slots)
    means, spreads = sums.means(), sums.spread(value_sums(model, [batch_of(rows)], level, slots, torch.square))
    for number in range(n_positions):
        places = [number] if number < n_positions - 1 else range(number, 12)
        pooled = [of for place in places for of in tokens.get(place, [])]
        for site in level.sites:
            mean, spread = means.tables[site], spreads.tables[site]
            assert mean.dtype == spread.dtype == torch.float32
            if not pooled:
                # As the nearest position before it, and zero where there is none.
                assert torch.equal(mean[number], mean[max(number - 1, 0)])
                assert torch.equal(spread[number], spread[max(number - 1, 0)])
                assert bool(mean[number].any()) == (number > 0)
                continue
            together = torch.stack([of[site] for of in pooled])
            assert_close(mean[number].double(), together.mean(0), rtol=1e-6, atol=1e-6)
            assert_close(spread[number].double(), together.std(0, unbiased=False), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_means_at_a_span_are_plain_averages_there(model, side):
    level = Nodes.of(model.config, ["mlp", "heads"], ["m1@early", "m1@last", "a0@last", "m2@-1"])
    rows, slots = prompts(5, 6, 8, seed=5), Slots(1, level.spans)
    spans = {"early": (1, 2), "last": (4, 5), None: range(1, 12)}
    batches = [with_spans(batch_of(part, side, 9), early=(1, 2), last=(4, 5)) for part in (rows[:2], rows[2:])]
    sums = value_sums(model, batches, level, slots)
    tokens = counted_alone(model, level, rows)
    alone = [read_values(model, batch_of([row]), level) for row in rows]
    for number, span in enumerate(level.spans):
        for site in level.sites:
            if span == "-1":
                together = torch.stack([values[site][0, -1] for values in alone])
            else:
                together = torch.stack([of[site] for place in spans[span] for of in tokens.get(place, [])])
            assert sums.counts[number] == len(together)
            assert_close(sums.means().tables[site][number].double(), together.mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slots", [Slots(), Slots(4), Slots(1, (None, "s", "-1"))], ids=["pooled", "position", "span"])
def test_uneven_batches_and_one_batch_agree(model, level, slots):
    rows = prompts(9, 4, 8, seed=1)

    def summed(*parts: list[list[int]]) -> StreamingMeans:
        return value_sums(model, [with_spans(batch_of(part), s=(2, 3)) for part in parts], level, slots)

    whole, parts = summed(rows), (rows[:1], rows[1:6], rows[6:])
    assert_same(summed(*parts), whole)
    assert_same(summed(*parts[::-1]), whole)
    for site, table in summed(*parts).means().tables.items():
        assert_close(table, whole.means().tables[site])


def test_a_batch_of_nothing_but_bos_adds_nothing(model, level):
    sums = value_sums(model, [batch_of([[BOS], [BOS]]), batch_of([[BOS, 5, 6]])], level, Slots(3))
    assert sums.counts.tolist() == [0, 1, 1]


def test_no_token_no_mean():
    with pytest.raises(ValueError, match="No token was counted"):
        StreamingMeans().means()
