"""Resample and counterfactual ablation: which prompt stands in for which, and that its values do."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.prompts import OtherPromptAblation
from oa_train.batches import Batch
from oa_train.engine.reading import read_values
from oa_train.errors import TaskError
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from oa_train.tasks import IOI, Task
from oa_train.tasks.partners import Partners
from oa_train.tasks.task import stream_of
from tests.builders import batch_of, random_batch, small_ioi, tiny_model, widened, with_spans

EXACT = {"rtol": 0, "atol": 1e-12}
N_PROMPTS = 16


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec(dtype="float64"))


def rows_of(batch: Batch) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(batch.tokens, batch.attention_mask, strict=True)]


def partners(batch: Batch, task: Task | None = None, seed: int = 0) -> list[list[int]]:
    return rows_of(Partners(task or small_ioi(), seed)(batch))


@pytest.fixture(scope="module")
def whole() -> Batch:
    return small_ioi().batch("test", 0, N_PROMPTS)


def test_a_partner_is_another_prompt_of_equal_length_from_the_means_stream(whole):
    task = small_ioi(n_means=128)
    donated = {tuple(row) for batch in task.batches("means", task.n_means) for row in rows_of(batch)}
    for stream in ("train", "refit", "validation", "test"):
        batch = task.batch(stream, 0, 24)
        own = rows_of(batch)
        drawn = partners(batch, task)
        assert [len(row) for row in drawn] == [len(row) for row in own]
        assert {tuple(row) for row in drawn} <= donated
        assert not {tuple(row) for row in own} & donated


def test_prompts_have_partners_of_their_own():
    task = small_ioi(n_tokens=18, n_means=48)
    drawn = [tuple(row) for row in partners(task.batch("test", 0, 48), task)]
    # 48 draws from 48 donors hit about 30 of them.
    assert 22 < len(set(drawn)) < 40
    assert sum(row == other for row, other in zip(drawn[1:], drawn, strict=False)) < 4


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_partner_depends_on_no_other_prompt_and_no_padding(whole, side, size):
    task, expected = small_ioi(padding_side=side), partners(whole)
    assert [row for batch in task.batches("test", N_PROMPTS, size) for row in partners(batch, task)] == expected
    assert partners(widened(task.batch("test", 0, N_PROMPTS), side, 7), task) == expected
    assert partners(whole.repeat(2)) == expected * 2
    again = Partners(task, 0)
    for batch in reversed(list(task.batches("test", N_PROMPTS, size))):  # whatever was asked before
        assert rows_of(again(batch)) == [expected[number] for number in batch.example_ids.tolist()]


def test_partners_stand_in_their_prompts_columns_and_nothing_else_changes(whole):
    for batch in (whole, small_ioi(padding_side="left").batch("test", 0, N_PROMPTS)):
        other = Partners(small_ioi(), 0)(batch)
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
    drawn = [partners(batch, task, seed) for seed in range(3)]
    for number in range(2):
        assert sum(row != other for row, other in zip(drawn[number], drawn[number + 1], strict=True)) > 10
    assert drawn[0] == partners(batch, task, 0)


def test_a_length_that_no_donor_has_gets_the_first_further_prompt_of_that_length(whole):
    task = small_ioi(n_means=1)
    drawn = partners(whole, task)
    later = [rows_of(task.batch("means", number, 1))[0] for number in range(100)]
    for row, own in zip(drawn, rows_of(whole), strict=True):
        assert row == next(candidate for candidate in later if len(candidate) == len(own))
    assert partners(whole.rows(slice(9, 12)), task) == drawn[9:12]


def test_a_length_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setattr("oa_train.tasks.partners.FURTHER_PROMPTS", 10)
    task = small_ioi()
    odd = batch_of([[task.bos_token_id, *range(5, 45)]])
    message = r"needs another prompt of 41 tokens, and there is none among 10 .* task ioi.*n_means, or .*ablation"
    with pytest.raises(TaskError, match=message):
        Partners(task, 0)(odd)


@pytest.fixture(scope="module")
def level(model):
    return Nodes.of(model.config, ["embedding", "heads", "mlp"])


@pytest.fixture(scope="module")
def values_of(model, level):
    return partial(read_values, model, level=level)


@pytest.mark.parametrize("side", ["left", "right"])
def test_resampled_values_are_those_of_the_partners_alone(values_of, side):
    task = small_ioi(padding_side=side)
    batch = task.batch("test", 0, 6)
    values = OtherPromptAblation(Partners(task, 3)).replacements(batch, values_of)
    for row, tokens in enumerate(partners(batch, seed=3)):
        for site, alone in values_of(batch_of([tokens])).items():
            assert_close(values[site][row, batch.attention_mask[row]], alone[0], **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_counterfactual_values_are_those_of_the_counterfactuals(values_of, side):
    task = small_ioi(padding_side=side)
    batch = task.batch("test", 0, 6)
    values = OtherPromptAblation(Batch.counterfactual).replacements(batch, values_of)
    clean = values_of(batch)
    for row in range(6):
        (tokens,) = task.encoder.encode([task.prompt("test", row).counterfactual])
        for site, alone in values_of(batch_of([tokens])).items():
            assert_close(values[site][row, batch.attention_mask[row]], alone[0], **EXACT)
            assert (values[site][row] - clean[site][row]).abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("span", ["S1", "S2", "IO", "end", "-1"])
def test_at_a_span_the_partners_same_span_is_taken(model, span, side):
    task, level = small_ioi(padding_side=side), Nodes.of(model.config, patterns=[f"m*@{span}", f"a*@{span}"])
    batch, donors_of = task.batch("test", 0, 8), Partners(task, 3, [span])
    values = OtherPromptAblation(donors_of, [span]).replacements(batch, partial(read_values, model, level=level))
    others, moved = donors_of(batch), 0
    whole = read_values(model, others, level)
    for row in range(8):
        own = batch.layout.span(span)[row].nonzero().flatten().tolist()
        theirs = others.layout.span(span)[row].nonzero().flatten().tolist()
        moved += own != theirs
        for site in level.sites:
            for column, source in zip(own, theirs, strict=True):
                assert torch.equal(values.at(site, span)[row, column], whole[site][row, source])
    # Names stand at other places in other sentences.
    assert span in ("end", "-1") or moved


def test_spans_of_other_lengths_are_refused():
    model = tiny_model("gpt2")
    level = Nodes.of(model.config, ["mlp"], ["m1@s"])
    batch, longer = (with_spans(random_batch([7, 6]), s=at) for at in ((2, 3), (2, 3, 4)))
    with pytest.raises(
        TaskError, match="span 's' has 2 tokens in prompt 0 of a batch and 3 in the prompt that its replacements"
    ):
        OtherPromptAblation(lambda _: longer, ["s"]).replacements(batch, partial(read_values, model, level=level))


def test_a_task_without_counterfactuals_is_refused_with_what_to_do(values_of, monkeypatch):
    task = IOI()
    draw = task.draw
    monkeypatch.setattr(task, "draw", lambda random: replace(draw(random), counterfactual=None))
    assert stream_of(task.prompt("test", 0).text) == "test"
    with pytest.raises(TaskError, match=r"no counterfactuals: their task makes none.*Choose another ablation, or"):
        OtherPromptAblation(Batch.counterfactual).replacements(task.batch("test", 0, 2), values_of)
