"""The batch: positions, tiling, rows and counterfactuals by hand."""

from dataclasses import fields, replace

import pytest
import torch

from oa_train.batches import Batch, leading_tokens, unanswered
from oa_train.errors import TaskError
from tests.builders import batch_of

ROWS = [[1, 7, 8, 9], [1, 5]]


def full_batch(side: str = "right") -> Batch:
    """A batch in which every field has values of its own."""
    batch = batch_of(ROWS, side)
    return replace(
        batch,
        answers=torch.tensor([[[5, -1]], [[6, 7]]]),
        distractors=torch.tensor([[[8]], [[9]]]),
        counterfactual_tokens=batch.tokens + 10,
        example_ids=torch.tensor([40, 41]),
    )


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def test_positions_count_from_the_first_real_token():
    assert batch_of(ROWS, "right").positions.tolist() == [[0, 1, 2, 3], [0, 1, 1, 1]]
    assert batch_of(ROWS, "left").positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch_of(ROWS, "left", 6).positions.tolist() == [[0, 0, 0, 1, 2, 3], [0, 0, 0, 0, 0, 1]]


def test_length_is_the_number_of_prompts():
    assert len(full_batch()) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_repeat_tiles_whole_batches(side):
    batch = full_batch(side)
    tiled = batch.repeat(3)
    assert len(tiled) == 6
    assert tiled.example_ids.tolist() == [40, 41, 40, 41, 40, 41]
    assert len(tensors_of(tiled)) == 9
    for name, tensor in tensors_of(tiled).items():
        for sample in range(3):
            for row in range(2):
                assert torch.equal(tensor[sample * 2 + row], tensors_of(batch)[name][row])
    assert tiled.padded is batch.padded


def test_repeating_once_is_the_batch_itself():
    batch = full_batch()
    assert batch.repeat(1) is batch


def test_rows_are_taken_from_every_field():
    second = full_batch().rows(slice(1, 2))
    assert second.tokens.tolist() == [[1, 5, 0, 0]]
    assert second.attention_mask.tolist() == [[True, True, False, False]]
    assert second.scored.tolist() == [[1]]
    assert second.weights.tolist() == [[1.0]]
    assert second.answers.tolist() == [[[6, 7]]]
    assert second.distractors.tolist() == [[[9]]]
    assert second.counterfactual_tokens.tolist() == [[11, 15, 10, 10]]
    assert second.example_ids.tolist() == [41]
    assert second.padded


def test_to_moves_every_tensor_but_the_numbers():
    moved = tensors_of(full_batch().to("meta"))
    assert len(moved) == 9
    # Generators are seeded by the numbers, and reading them from a GPU would wait for it.
    assert moved.pop("example_ids").tolist() == [40, 41]
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    without = replace(full_batch(), counterfactual_tokens=None).to("meta")
    assert without.counterfactual_tokens is None


def test_counterfactual_takes_the_place_of_the_prompts():
    batch = full_batch()
    other = batch.counterfactual()
    assert torch.equal(other.tokens, batch.tokens + 10)
    assert other.counterfactual_tokens is None
    assert torch.equal(other.positions, batch.positions)
    assert torch.equal(other.answers, batch.answers)
    with pytest.raises(ValueError, match="no counterfactuals"):
        other.counterfactual()


def test_a_prompt_s_average_is_over_its_own_scored_positions():
    batch = replace(
        batch_of(ROWS),
        scored=torch.tensor([[1, 3], [1, 1]]),
        weights=torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
        answers=torch.full((2, 2, 1), 5),
        distractors=torch.full((2, 2, 1), 6),
    )
    values = torch.tensor([[2.0, 4.0], [7.0, 100.0]])
    assert batch.average(values).tolist() == [3.0, 7.0]
    assert batch.average(values.double()).dtype == torch.float64
    assert batch.repeat(2).average(values.repeat(2, 1)).tolist() == [3.0, 7.0] * 2


def test_lengths_count_real_tokens():
    assert batch_of(ROWS, "left", 9).lengths.tolist() == [4, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_without_answers_are_scored_at_their_last_real_token(side):
    expected = batch_of(ROWS, side, 6)
    batch = unanswered(expected.tokens, expected.attention_mask)
    assert torch.equal(batch.scored, expected.scored)
    assert batch.weights.tolist() == [[1.0], [1.0]]
    assert (batch.answers == -1).all()
    assert (batch.distractors == -1).all()
    assert batch.counterfactual_tokens is None
    assert batch.example_ids.tolist() == [0, 1]
    assert batch.padded
    assert not unanswered(torch.tensor([ROWS[0]]), torch.ones(1, 4).bool()).padded


SPANS = {"name": torch.tensor([[False, True, True, False], [False, True, False, False]])}


def test_spans_follow_their_rows():
    batch = replace(batch_of(ROWS), spans=SPANS)
    assert torch.equal(batch.repeat(2).spans["name"], SPANS["name"].repeat(2, 1))
    assert torch.equal(batch.rows(slice(1, 2)).spans["name"], SPANS["name"][1:])
    assert batch.to("meta").spans["name"].device.type == "meta"


@pytest.mark.parametrize("side", ["left", "right"])
def test_negative_spans_count_from_the_last_real_token(side):
    layout = batch_of(ROWS, side, 6).layout
    columns = [3, 1] if side == "right" else [5, 5]
    assert layout.span("-1").nonzero().tolist() == [[0, columns[0]], [1, columns[1]]]
    assert batch_of(ROWS, side, 6).repeat(2).layout.span("-1").sum() == 4
    longer = batch_of([[1, 7, 8], [1, 7, 8, 9]], side).layout
    assert longer.span("-2").long().argmax(dim=1).tolist() == ([1, 2] if side == "right" else [2, 2])


def test_spans_without_a_token_to_ablate_are_refused():
    layout = replace(batch_of(ROWS), spans=SPANS | {"start": torch.tensor([[True] + [False] * 3] * 2)}).layout
    assert torch.equal(layout.span("name"), SPANS["name"])
    with pytest.raises(TaskError, match=r"'-3' is empty in prompt 1"):
        layout.span("-3")
    with pytest.raises(TaskError, match=r"'start' holds protected tokens only in prompt 0"):
        layout.span("start")
    with pytest.raises(TaskError, match=r"no span 'nam' in these prompts\. Did you mean name\?"):
        layout.span("nam")
    with pytest.raises(TaskError, match=r"These prompts name no spans\. -1 is the last token"):
        batch_of(ROWS).layout.span("name")


def test_a_leading_token_is_the_first_real_one():
    for side in ("left", "right"):
        batch = batch_of([*ROWS, [5, 1]], side)
        leading = leading_tokens(batch.tokens, batch.positions, 1)
        assert torch.equal(leading, batch.protected)
        assert leading.any(dim=1).tolist() == [True, True, False]
    assert not leading_tokens(batch.tokens, batch.positions, None).any()


def test_the_first_scored_column_is_known_without_asking_the_device():
    batch = full_batch()
    assert batch.scored_from == int(batch.scored.min()) > 0
    assert batch.to("meta").scored_from == batch.scored_from
    assert batch.to("meta").repeat(3).scored_from == batch.scored_from
    assert batch.to("meta").counterfactual().scored_from == batch.scored_from
    late = batch_of([[3, 4], [3, 4, 5, 6]])
    assert (late.scored_from, late.rows(slice(1, 2)).scored_from) == (1, 3)
    # Of other scored columns nothing is known on a device, so that none can be left out.
    assert replace(batch, scored=torch.zeros(2, 1, dtype=torch.long)).scored_from == 0
    moved = batch.to("meta")
    assert replace(moved, scored=moved.scored).scored_from == 0
