import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from oa_train.errors import TaskError
from oa_train.models.spec import LMSpec
from oa_train.tasks import GreaterThan
from oa_train.tasks.vocabulary import read_words
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


def test_single_digits_are_asked_for_one_after_the_other(digits_lm: LMSpec) -> None:
    task = GreaterThan(lm=digits_lm, answer_positions="every")
    seen = set()
    for index in range(200):
        prompt = task.prompt("train", index)
        begin, start, again = re.fullmatch(
            r"The \w+ lasted from the year (\d{3})(\d) to the year (\d{3})", prompt.text
        ).groups()
        assert begin == again
        seen.add(start)
        assert prompt.answers == tuple("0123456789"[int(start) + 1 :])
        assert prompt.distractors == tuple("0123456789"[: int(start) + 1])
        assert prompt.counterfactual == prompt.text.replace(f"{begin}{start}", f"{begin}0")
        assert [prompt.text[slice(*prompt.spans[name])] for name in ("year", "end")] == [start, begin[2]]
        # A later year may begin with the same tens digit, which the text itself goes on with.
        (tens,) = prompt.earlier
        assert tens.text == prompt.text[:-1]
        assert tens.answers == tuple("0123456789"[int(begin[2]) :])
        assert tens.distractors == tuple("0123456789"[: int(begin[2])]) != ()
    assert seen == set("12345678")
    batch = task.batch("test", 0, 8)
    end = batch.lengths - 1
    assert batch.scored.tolist() == [[int(last) - 1, int(last)] for last in end]
    assert (batch.counterfactual_tokens != batch.tokens).sum(dim=1).tolist() == [1] * 8


def test_a_tokenizer_without_numbers_is_refused(words_only_lm: LMSpec) -> None:
    with pytest.raises(
        TaskError, match=r"greater_than .*: 0 of the 900 years end with a token of two digits or of one"
    ):
        GreaterThan(lm=words_only_lm)


@pytest.fixture
def words_only_lm(tmp_path: Path) -> LMSpec:
    words = ["<unk>", "Then", "year", *read_words("nouns")]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    return LMSpec(str(tmp_path))
