import re

import pytest

from oa_train.errors import TaskError
from oa_train.models.loading import LMSpec
from oa_train.tasks import GreaterThan
from tests.builders import RARE


@pytest.fixture(params=["tiny", "bytes"])
def task(request: pytest.FixtureRequest) -> GreaterThan:
    return GreaterThan(lm=LMSpec() if request.param == "tiny" else request.getfixturevalue("bytes_lm"))


def test_answers_are_exactly_the_later_years(task: GreaterThan) -> None:
    for index in range(300):
        prompt = task.prompt("train", index)
        noun, century, start, again = re.fullmatch(
            r"The (\w+) lasted from the year (\d\d)(\d\d) to the year (\d\d)", prompt.text
        ).groups()
        assert century == again
        assert noun in task.nouns
        years = task.years[century]
        assert set(prompt.answers) == {year for year in years if int(year) > int(start)} != set()
        assert set(prompt.distractors) == {year for year in years if int(year) <= int(start)} != set()
        assert prompt.counterfactual == f"The {noun} lasted from the year {century}01 to the year {century}"
        assert int(start) > 1
        words = {name: prompt.text[slice(*span)] for name, span in prompt.spans.items()}
        assert words == {"noun": noun, "year": start, "end": century[1]}
        assert prompt.spans["year"][0] == prompt.text.index(century + start) + 2


def test_ids_are_those_of_the_years(task: GreaterThan) -> None:
    batch = task.batch("test", 0, 16)
    for row in range(16):
        prompt = task.prompt("test", row)
        for pieces, ids in ((prompt.answers, batch.answers[row]), (prompt.distractors, batch.distractors[row])):
            before, *whole = task.encoder.encode([prompt.text, *(prompt.text + piece for piece in pieces)])
            assert whole == [[*before, token] for token in ids[ids >= 0].tolist()]


def test_the_counterfactual_changes_the_first_year_only(task: GreaterThan) -> None:
    batch = task.batch("train", 0, 32)
    changed = batch.counterfactual_tokens != batch.tokens
    assert (changed.sum(dim=1) == 1).all()
    assert changed.any(dim=0).nonzero().tolist() == [[8]]


def test_years_that_are_split_otherwise_are_left_out(bytes_lm: LMSpec) -> None:
    task = GreaterThan(lm=bytes_lm)
    assert all("55" not in years for years in task.years.values())
    assert "55" in GreaterThan().years["17"]
    assert all(year != "55" for _, year in task.starts)
    assert not RARE & set(task.nouns)


def test_a_tokenizer_that_splits_digits_is_refused(digits_lm: LMSpec) -> None:
    with pytest.raises(TaskError, match=r"greater_than .*: 0 of the 900 years are a century and one further token"):
        GreaterThan(lm=digits_lm)
