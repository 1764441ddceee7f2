"""Pairs of subjects against their definition, on words whose tokens are their letters."""

import pytest

from oa_train.models.spec import LMSpec
from oa_train.tasks.encoding import PromptEncoder
from oa_train.tasks.subject_pairs import pair_name, pair_subjects


@pytest.fixture(scope="module")
def letters(letters_lm: LMSpec) -> PromptEncoder:
    return PromptEncoder.of(letters_lm)


def may_pair(facts: dict, subject: str, other: str) -> bool:
    """The definition, for words of one token a letter."""
    own, others = facts[subject], facts[other]
    return (
        len(subject) == len(other)
        and own.keys() == others.keys()
        and not any({name[0] for name in own[key]} & {name[0] for name in others[key]} for key in own)
    )


def test_partners_are_as_long_and_differ_in_every_relation(letters: PromptEncoder) -> None:
    names = [f"{first}{second}{'z' * (number % 3)}" for number, first in enumerate("abcdefgh") for second in "klm"]
    facts = {
        name: {"town": [f"{'pqr'[number % 3]}ara"], "job": [f"{'stuv'[number % 4]}as", "ymer"]}
        if number % 5
        else {"town": ["wara"]}
        for number, name in enumerate(names)
    }
    for name in names[::2]:
        facts[name].get("job", []).append("xen")
    partners = pair_subjects(letters, facts)
    assert not partners  # the second name of all jobs begins alike, and those without a job have the same town
    facts = {name: {relation: words[:1] for relation, words in known.items()} for name, known in facts.items()}
    partners = pair_subjects(letters, facts)
    assert len(partners) > 10
    assert all(may_pair(facts, subject, other) for subject, other in partners.items())
    for subject in facts.keys() - partners.keys():
        assert not any(may_pair(facts, subject, other) for other in facts if other != subject)


def test_of_an_odd_number_the_last_has_a_partner_with_another_one(letters: PromptEncoder) -> None:
    facts = {"one": {"of": ["a"]}, "two": {"of": ["b"]}, "six": {"of": ["c"]}, "four": {"of": ["d"]}}
    partners = pair_subjects(letters, facts)
    assert partners.keys() == {"one", "two", "six"}
    mutual = [subject for subject, other in partners.items() if partners[other] == subject]
    assert len(mutual) == 2
    assert {pair_name(partners, subject) for subject in partners} == {min(mutual)}


def test_any_common_name_is_a_common_object(letters: PromptEncoder) -> None:
    facts = {"one": {"of": ["kyiv", "kiev"]}, "two": {"of": ["minsk", "kansas"]}}
    assert not pair_subjects(letters, facts)
    assert pair_subjects(letters, facts | {"two": {"of": ["minsk"]}}) == {"one": "two", "two": "one"}
