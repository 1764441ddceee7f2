import re

import pytest
import torch

from oa_train.errors import ConfigurationError, TaskError
from oa_train.models.spec import LMSpec
from oa_train.tasks import Induction
from tests.builders import RARE


@pytest.mark.parametrize("length", [3, 8, 12])
def test_the_answer_followed_the_last_word_before(lm: LMSpec, length: int) -> None:
    task = Induction(lm=lm, length=length)
    for index in range(100):
        prompt = task.prompt("train", index)
        opening, *row, repeated = prompt.text.split()
        assert opening == "Words:"
        assert len(row) == len(set(row)) == length
        answer = row[row.index(repeated) + 1]
        assert prompt.answers == (f" {answer}",)
        assert {word.strip() for word in prompt.distractors} == set(row) - {repeated, answer}


def test_the_repeated_word_stands_anywhere_but_last() -> None:
    task = Induction(length=4)
    places = set()
    for index in range(100):
        *row, repeated = task.prompt("train", index).text.split()[1:]
        places.add(row.index(repeated))
    assert places == {0, 1, 2}


def test_the_counterfactual_leaves_nothing_to_induce() -> None:
    task = Induction()
    for index in range(100):
        prompt = task.prompt("train", index)
        row, other = prompt.text.split(), prompt.counterfactual.split()
        changed = [place for place, (one, two) in enumerate(zip(row, other, strict=True)) if one != two]
        assert changed == [row.index(row[-1])]
        assert other[changed[0]] not in row
        assert other.count(other[-1]) == 1


@pytest.mark.parametrize(("length", "repeated"), [(3, 1), (5, 3), (8, 2), (8, 7)])
def test_words_come_back_in_their_order_and_each_is_a_question(lm: LMSpec, length: int, repeated: int) -> None:
    task = Induction(lm=lm, length=length, repeated=repeated)
    for index in range(50):
        prompt = task.prompt("train", index)
        words = prompt.text.split()[1:]
        row, again = words[:length], words[length:]
        assert len(row) == len(set(row)) == length
        place = row.index(again[0])
        assert again == row[place : place + repeated]
        starts = [len(" ".join(["Words:", *row[:number]])) + 1 for number in (place + repeated - 1, place + repeated)]
        assert [prompt.spans["first"][0], prompt.spans["after"][0]] == starts
        assert prompt.text[slice(*prompt.spans["first"])] == again[-1]
        assert prompt.text[slice(*prompt.spans["after"])] == row[place + repeated]
        questions = (*prompt.earlier, prompt)
        assert len(questions) == repeated
        for number, question in enumerate(questions):
            answer = row[place + number + 1]
            assert question.text == " ".join(["Words:", *row, *again[: number + 1]])
            assert question.answers == (f" {answer}",)
            assert {word.strip() for word in question.distractors} == set(row) - {again[number], answer}


def test_the_counterfactual_of_several_words_leaves_nothing_to_induce() -> None:
    task = Induction(length=8, repeated=3)
    for index in range(100):
        prompt = task.prompt("train", index)
        words, other = prompt.text.split(), prompt.counterfactual.split()
        changed = [place for place, (one, two) in enumerate(zip(words, other, strict=True)) if one != two]
        assert changed == list(range(changed[0], changed[0] + 3))
        assert words[changed[0] : changed[-1] + 1] == words[-3:] == other[-3:]
        assert len(set(other[1:])) == len(other[1:])  # no word comes back


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_answer_is_scored_where_the_text_goes_on_with_it(lm: LMSpec, side: str) -> None:
    task = Induction(lm=lm, length=6, repeated=3, answer_positions="every", padding_side=side)
    batch, width = task.batch("train", 0, 16), len(task.encoder.encode([task.prompt("train", 0).text])[0])
    assert batch.scored.tolist() == [[width - 3, width - 2, width - 1]] * 16
    assert torch.allclose(batch.weights, torch.full((16, 3), 1 / 3))
    assert batch.answers.shape == (16, 3, 1)
    assert batch.distractors.shape == (16, 3, 4)
    for row in range(16):
        # Each word that comes back but the last is followed by the answer to it.
        assert batch.tokens[row, width - 2 :].tolist() == batch.answers[row, :-1, 0].tolist()
        for place in range(3):
            assert not set(batch.answers[row, place].tolist()) & set(batch.distractors[row, place].tolist())
    last = Induction(lm=lm, length=6, repeated=3, padding_side=side).batch("train", 0, 16)
    assert torch.equal(last.tokens, batch.tokens)
    assert torch.equal(last.scored, batch.scored[:, -1:])
    assert torch.equal(last.answers, batch.answers[:, -1:])
    assert last.weights.tolist() == [[1.0]] * 16


def test_split_words_are_never_drawn(bytes_lm: LMSpec) -> None:
    task = Induction(lm=bytes_lm)
    texts = " ".join(task.prompt("train", index).text for index in range(500))
    assert not RARE & set(re.findall(r"\w+", texts))


def test_rows_that_are_too_short_or_too_long_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="length is 2; expected at least 3"):
        Induction(length=2)
    with pytest.raises(
        ConfigurationError, match=r"are 60 and 1; expected a sum of at most 49, the words of the task's"
    ):
        Induction(length=60)
    for repeated in (0, 8):
        with pytest.raises(ConfigurationError, match=f"repeated is {repeated}; expected 1 to 7 words"):
            Induction(length=8, repeated=repeated)


def test_words_of_the_whole_vocabulary_are_repeated_in_full(bytes_lm: LMSpec) -> None:
    task = Induction(lm=bytes_lm, length=25, repeated=24, vocabulary="model", answer_positions="every")
    assert len(set(task.words)) == len(task.words) > 60 > len(Induction(lm=bytes_lm).words)
    assert {"river", "Anna"} <= set(task.words)  # words of no list of the task are among them
    assert not RARE & set(task.words)
    batch = task.batch("train", 0, 8)
    row = batch.tokens[0, -49:]
    assert row[:24].tolist() == row[25:].tolist()
    assert batch.scored[0].tolist() == list(range(batch.tokens.shape[1] - 24, batch.tokens.shape[1]))
    assert batch.answers[0, :, 0].tolist() == row[1:25].tolist()
    with pytest.raises(TaskError, match=r"induction .* tokens of the vocabulary are words .* at least 100000 are"):
        Induction(lm=bytes_lm, length=50_001, repeated=49_999, vocabulary="model")


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="vocabulary is 'words'; expected one of list, model"):
        Induction(vocabulary="words")
