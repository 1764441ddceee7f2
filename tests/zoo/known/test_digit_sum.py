import pytest

from oa_train.errors import TaskError
from oa_train.zoo.known import DigitSum
from tests.known import known_case


def test_the_answer_is_the_sum_of_the_last_four() -> None:
    task = known_case("digit_sum").task
    lengths, answers = set(), set()
    for index in range(300):
        prompt = task.prompt("train", index)
        digits = [int(digit) for digit in prompt.text.split()]
        assert prompt.answers == (f" {sum(digits[-4:]) % 5}",)
        assert {*prompt.answers, *prompt.distractors} == {f" {digit}" for digit in range(5)}
        others = [int(digit) for digit in prompt.counterfactual.split()]
        changed = [i for i, pair in enumerate(zip(digits, others, strict=True)) if len(set(pair)) > 1]
        assert changed == [len(digits) - 4]
        lengths.add(len(digits))
        answers.add(prompt.answers)
    assert lengths == {5, 6, 7, 8, 9}
    assert len(answers) == 5


def test_a_tokenizer_without_single_digits_is_refused() -> None:
    with pytest.raises(TaskError, match="digit_sum cannot be posed"):
        DigitSum()
