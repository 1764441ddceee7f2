import pytest

from oa_train.errors import TaskError
from oa_train.zoo.known import CaseInduction
from tests.known import known_case


def test_the_answer_is_what_followed_before() -> None:
    task = known_case("case_induction").task
    lengths, cases = set(), set()
    for index in range(300):
        prompt = task.prompt("train", index)
        *row, again = prompt.text.split()
        letters = [word.lower() for word in row]
        assert len(set(letters)) == len(letters)
        place = letters.index(again.lower())
        assert prompt.answers == (f" {letters[place + 1]}",)
        assert {f" {letter}" for letter in letters} == {*prompt.answers, *prompt.distractors, f" {letters[place]}"}
        other = prompt.counterfactual.split()
        assert [i for i, pair in enumerate(zip(other, [*row, again], strict=True)) if len(set(pair)) > 1] == [place]
        assert other[place].lower() not in letters
        places = [prompt.text[slice(*prompt.spans[name])] for name in ("first", "after", "end")]
        assert places == [row[place], row[place + 1], again]
        assert prompt.spans["first"][0] == 2 * place
        lengths.add(len(row))
        cases.add((row[place].isupper(), again.isupper()))
    assert lengths == {4, 5, 6, 7}
    assert len(cases) == 4


def test_a_tokenizer_without_the_letters_is_refused() -> None:
    with pytest.raises(TaskError, match="of the 16 words that it is made of are single tokens"):
        CaseInduction()
