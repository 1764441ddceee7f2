import re

import pytest

from oa_train.errors import ConfigurationError, TaskError
from oa_train.models.loading import LMSpec
from oa_train.tasks import Induction
from tests.tasks.conftest import RARE


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


def test_split_words_are_never_drawn(bytes_lm: LMSpec) -> None:
    task = Induction(lm=bytes_lm)
    texts = " ".join(task.prompt("train", index).text for index in range(500))
    assert not RARE & set(re.findall(r"\w+", texts))


def test_rows_that_are_too_short_or_too_long_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="length is 2; expected at least 3"):
        Induction(length=2)
    with pytest.raises(TaskError, match=r"49 of the 49 words of its list 'induction' .*at least 61"):
        Induction(length=60)
