from itertools import pairwise

import pytest

from oa_train.errors import TaskError
from oa_train.zoo.known import TwoHops
from tests.known import known_case


def meanings(words: list[str]) -> dict[str, str]:
    return {one: other.lower() for one, other in pairwise(words) if one.islower()}


def test_the_answer_is_two_hops_away() -> None:
    task = known_case("two_hops").task
    sizes, places = set(), set()
    for index in range(300):
        prompt = task.prompt("train", index)
        *words, asked = prompt.text.split()
        found = meanings(words)
        assert found.keys() == set(found.values())
        assert prompt.answers == (f" {found[found[asked]]}",)
        assert {*prompt.answers, *prompt.distractors} == {f" {letter}" for letter in found}
        sizes.add((len(found), len(words) - 2 * len(found)))
        places.add(words.index(asked) % 2)
    assert sizes == {(pairs, fillers) for pairs in (4, 5) for fillers in range(4)}
    assert places == {0, 1}


def test_in_the_counterfactual_the_letters_stand_for_others() -> None:
    task = known_case("two_hops").task
    for index in range(100):
        prompt = task.prompt("train", index)
        words, others = prompt.text.split(), prompt.counterfactual.split()
        found = meanings(others[:-1])
        assert words[-1] == others[-1]
        assert [word for word in words if word.islower()] == [word for word in others if word.islower()]
        assert f" {found[found[others[-1]]]}" not in prompt.answers


def test_a_tokenizer_without_the_letters_is_refused() -> None:
    with pytest.raises(TaskError, match="two_hops cannot be posed"):
        TwoHops()
