"""Resample and counterfactual ablation: which prompt stands in for which, and that its values do."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.prompts import OtherPromptAblation
from oa_train.batches import Batch
from oa_train.engine.reading import source_values
from oa_train.errors import TaskError
from oa_train.models.loading import LMSpec, load_model
from oa_train.tasks import IOI, Task, donors
from oa_train.tasks.donors import Donors
from oa_train.tasks.task import stream_of
from tests.builders import batch_of, small_ioi, widened

EXACT = {"rtol": 0, "atol": 1e-12}
N_PROMPTS = 16


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec(dtype="float64"))


def rows_of(batch: Batch) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(batch.tokens, batch.attention_mask, strict=True)]


def partners(batch: Batch, task: Task | None = None, seed: int = 0) -> list[list[int]]:
    return rows_of(Donors(task or small_ioi(), seed)(batch))


@pytest.fixture(scope="module")
def whole() -> Batch:
    return small_ioi().batch("test", 0, N_PROMPTS)


def test_a_partner_is_another_prompt_of_equal_length_from_the_means_stream(whole):
    task = small_ioi(n_means=128)
    donated = {tuple(row) for batch in task.batches("means", task.n_means) for row in rows_of(batch)}
    for stream in ("train", "refit", "validation", "test"):
        batch = task.batch(stream, 0, 24)
        own = rows_of(batch)
        found = partners(batch, task)
        assert [len(row) for row in found] == [len(row) for row in own]
        assert {tuple(row) for row in found} <= donated
        assert not {tuple(row) for row in own} & donated


def test_prompts_have_partners_of_their_own():
    task = small_ioi(n_tokens=18, n_means=48)
    found = [tuple(row) for row in partners(task.batch("test", 0, 48), task)]
    # 48 draws from 48 donors hit about 30 of them.
    assert 22 < len(set(found)) < 40
    assert sum(one == other for one, other in zip(found[1:], found, strict=False)) < 4


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_partner_depends_on_no_other_prompt_and_no_padding(whole, side, size):
    task, expected = small_ioi(padding_side=side), partners(whole)
    assert [row for batch in task.batches("test", N_PROMPTS, size) for row in partners(batch, task)] == expected
    assert partners(widened(task.batch("test", 0, N_PROMPTS), side, 7), task) == expected
    assert partners(whole.repeat(2)) == expected * 2
    one = Donors(task, 0)
    for batch in reversed(list(task.batches("test", N_PROMPTS, size))):  # whatever was asked before
        assert rows_of(one(batch)) == [expected[number] for number in batch.example_ids.tolist()]


def test_partners_stand_in_their_prompts_columns_and_nothing_else_changes(whole):
    for batch in (whole, small_ioi(padding_side="left").batch("test", 0, N_PROMPTS)):
        other = Donors(small_ioi(), 0)(batch)
        assert torch.equal(other.tokens[~batch.attention_mask], batch.tokens[~batch.attention_mask])
        assert other.counterfactual_tokens is None
        assert other.padded == batch.padded
        for name in ("attention_mask", "scored", "weights", "answers", "distractors", "example_ids"):
            assert torch.equal(getattr(other, name), getattr(batch, name))
        rows = torch.arange(N_PROMPTS)
        assert (other.tokens[rows, batch.attention_mask.long().argmax(dim=1)] == small_ioi().bos_token_id).all()


def test_a_partner_follows_from_the_number_and_not_from_the_text():
    task = small_ioi(n_tokens=18)
    batches = [task.batch(stream, 0, N_PROMPTS) for stream in ("train", "test")]
    assert not torch.equal(batches[0].tokens, batches[1].tokens)
    assert partners(batches[0], task) == partners(batches[1], task)


def test_another_seed_gives_other_partners():
    task = small_ioi(n_tokens=18)
    batch = task.batch("test", 0, N_PROMPTS)
    found = [partners(batch, task, seed) for seed in range(3)]
    for number in range(2):
        assert sum(one != other for one, other in zip(found[number], found[number + 1], strict=True)) > 10
    assert found[0] == partners(batch, task, 0)


def test_a_length_that_no_donor_has_gets_the_first_further_prompt_of_that_length(whole):
    task = small_ioi(n_means=1)
    found = partners(whole, task)
    later = [rows_of(task.batch("means", number, 1))[0] for number in range(100)]
    for row, own in zip(found, rows_of(whole), strict=True):
        assert row == next(candidate for candidate in later if len(candidate) == len(own))
    assert partners(whole.rows(slice(9, 12)), task) == found[9:12]


def test_a_length_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setattr(donors, "FURTHER_PROMPTS", 10)
    task = small_ioi()
    odd = batch_of([[task.bos_token_id, *range(5, 45)]])
    message = r"needs another prompt of 41 tokens, and there is none among 10 .* task ioi.*n_means, or .*ablation"
    with pytest.raises(TaskError, match=message):
        Donors(task, 0)(odd)


@pytest.mark.parametrize("side", ["left", "right"])
def test_resampled_values_are_those_of_the_partners_alone(model, side):
    task = small_ioi(padding_side=side)
    batch = task.batch("test", 0, 6)
    ablation = OtherPromptAblation(Donors(task, 3), task.bos_token_id)
    found = ablation.replacements(batch, partial(source_values, model))
    for row, tokens in enumerate(partners(batch, seed=3)):
        alone = source_values(model, batch_of([tokens]))
        real = batch.attention_mask[row]
        assert_close(found.heads[:, row, real], alone.heads[:, 0], **EXACT)
        assert_close(found.mlps[:, row, real], alone.mlps[:, 0], **EXACT)
    assert ablation.bos_token_id == task.bos_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_counterfactual_values_are_those_of_the_counterfactuals(model, side):
    task = small_ioi(padding_side=side)
    batch = task.batch("test", 0, 6)
    found = OtherPromptAblation(Batch.counterfactual, 0).replacements(batch, partial(source_values, model))
    expected = source_values(model, batch.counterfactual())
    assert torch.equal(found.heads, expected.heads)
    assert torch.equal(found.mlps, expected.mlps)
    for row in range(6):
        tokens = task.encoder.encode([task.prompt("test", row).counterfactual])
        alone = source_values(model, batch_of(tokens))
        assert_close(found.mlps[:, row, batch.attention_mask[row]], alone.mlps[:, 0], **EXACT)
    assert (found.mlps - source_values(model, batch).mlps).abs().max() > 1e-2


def test_a_task_without_counterfactuals_is_refused_with_what_to_do(model, monkeypatch):
    task = IOI()
    draw = task.draw
    monkeypatch.setattr(task, "draw", lambda random: replace(draw(random), counterfactual=None))
    assert stream_of(task.prompt("test", 0).text) == "test"
    ablation = OtherPromptAblation(Batch.counterfactual, task.bos_token_id)
    with pytest.raises(TaskError, match=r"no counterfactuals: their task makes none.*Choose another ablation, or"):
        ablation.replacements(task.batch("test", 0, 2), partial(source_values, model))
