import pytest

from oa_train.errors import TaskError
from oa_train.zoo.known import PairInduction
from tests.known import known_case


def test_only_both_letters_together_tell_the_answer() -> None:
    task = known_case("pair_induction").task
    lengths, places = set(), set()
    for index in range(300):
        prompt = task.prompt("train", index)
        letters = prompt.text.lower().split()
        *row, first, second = letters
        after_both = [row[i] for i in range(2, len(row)) if (row[i - 2], row[i - 1]) == (first, second)]
        after_first = [row[i] for i in range(2, len(row)) if row[i - 2] == first]
        after_second = [row[i] for i in range(1, len(row)) if row[i - 1] == second]
        assert [f" {letter}" for letter in after_both] == list(prompt.answers)
        assert len(after_first) == len(after_second) == 2
        assert {f" {letter}" for letter in (*after_first, *after_second)} == {*prompt.answers, *prompt.distractors}
        other = prompt.counterfactual.split()
        changed = [i for i, pair in enumerate(zip(other, prompt.text.split(), strict=True)) if len(set(pair)) > 1]
        assert len(changed) == 1
        assert letters[changed[0] : changed[0] + 3] == [first, second, after_both[0]]
        lengths.add(len(letters))
        places.add(changed[0])
    assert lengths == {11, 12, 13, 14}
    assert len(places) > 5


def test_a_tokenizer_without_the_letters_is_refused() -> None:
    with pytest.raises(TaskError, match="pair_induction cannot be posed"):
        PairInduction()
