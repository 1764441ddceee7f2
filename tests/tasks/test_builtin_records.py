"""The prompts that come with the package, for two tokenizers: letters of their own, and words of one token."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from oa_train.errors import TaskError
from oa_train.models.spec import LMSpec
from oa_train.tasks import Agreement, Capitals
from oa_train.tasks.builtin_records import ShippedRecords
from oa_train.tasks.vocabulary import read_data

DATA = read_data("capitals")
CAPITALS = {country: names.split("|") for country, names in DATA["capitals"].items()}


@pytest.fixture(scope="session")
def words_lm(tmp_path_factory: pytest.TempPathFactory) -> LMSpec:
    """Every word of the tasks is one token, but for the verb "likes"."""
    agreement = read_data("agreement")
    texts = [*CAPITALS, *(name for names in CAPITALS.values() for name in names), *DATA["templates"]]
    texts += [word for kind in ("nouns", "verbs") for pair in agreement[kind].items() for word in pair]
    texts += [*agreement["templates"], "Then <unk>"]
    split = pre_tokenizers.WhitespaceSplit()
    words = {word: None for text in texts for word, _ in split.pre_tokenize_str(text) if word != "likes"}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    folder = Path(tmp_path_factory.mktemp("words"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    GPT2Config().save_pretrained(folder)
    return LMSpec(str(folder))


def prompts(task: ShippedRecords) -> list:
    return [prompt for stream in ("train", "validation", "test") for prompt in task.streams[stream]]


def test_the_list_of_capitals_is_large_and_free_of_doubles() -> None:
    names = [name for names in CAPITALS.values() for name in names]
    assert len(CAPITALS) >= 60
    assert len(set(names)) == len(names)
    # A capital that repeats its country could be copied.
    assert not [country for country, names in CAPITALS.items() if any(country in name for name in names)]


@pytest.mark.parametrize("kind", ["words_lm", "letters_lm"])
def test_countries_are_paired_by_tokens(request: pytest.FixtureRequest, kind: str) -> None:
    task = Capitals(lm=request.getfixturevalue(kind))
    assert not task.left_out
    streams = {}
    for stream in ("train", "validation", "test"):
        for prompt in task.streams[stream]:
            country = prompt.text[slice(*prompt.spans["subject"])]
            # Where the space is a token of its own, it belongs to the prompt.
            text = prompt.text.rstrip()
            template = text.replace(country, "{subject}")
            before, after = template.split("{subject}")
            other = prompt.counterfactual.rstrip().removeprefix(before).removesuffix(after)
            assert template in DATA["templates"]
            right, wrong, row, counterfactual = task.encoder.encode(
                [f"{text} {CAPITALS[name][0]}" for name in (country, other)] + [prompt.text, prompt.counterfactual]
            )
            assert len(row) == len(counterfactual)
            first, second = right[len(row)], wrong[len(row)]
            assert first != second
            assert task.encoder.continuation(prompt.text, prompt.answers[0]) == first
            assert task.encoder.continuation(prompt.text, prompt.distractors[0]) == second
            streams.setdefault(country, set()).add(stream)
            streams.setdefault(other, set()).add(stream)
    assert all(len(used) == 1 for used in streams.values())  # no country is in two streams, not as a partner either


def test_a_country_of_a_length_of_its_own_is_left_out_and_named(words_lm: LMSpec) -> None:
    # The only country of three words.
    task = Capitals(lm=words_lm)
    assert task.remarks[0].startswith("1 of 135 countries are left out")
    assert task.remarks[0].endswith("otherwise: Papua New Guinea.")
    assert len(prompts(task)) == 134 * len(DATA["templates"])


def test_of_several_names_every_takes_the_first(words_lm: LMSpec) -> None:
    task = Capitals(lm=words_lm, answer_positions="every")
    assert not task.left_out
    answers = {prompt.answers for prompt in prompts(task) if "Ukraine" in prompt.text}
    assert answers == {(" Kyiv",)}


def test_every_letter_of_a_capital_can_be_scored(letters_lm: LMSpec) -> None:
    """Two bytes of "é" are no text, and are passed over; the letters around them are scored."""
    task = Capitals(lm=letters_lm, answer_positions="every")
    assert not task.left_out
    answers = {}
    for prompt in prompts(task):
        country = prompt.text[slice(*prompt.spans["subject"])]
        answers[country] = "".join(question.answers[0] for question in (*prompt.earlier, prompt))
    assert answers["India"] == "New Delhi"
    assert answers["Cameroon"] == "Yaound"
    assert answers["Brazil"] == "Braslia"
    assert f"{len(prompts(task))} of {len(prompts(task))} prompts" in next(
        remark for remark in task.remarks if "several tokens" in remark
    )
    assert task.batch("train", 0).scored.shape[1] > 3


def test_verbs_agree_with_the_subject_and_not_with_the_attractor(words_lm: LMSpec) -> None:
    task = Agreement(lm=words_lm)
    data = read_data("agreement")
    plurals = data["nouns"]
    verbs = [verb for verb in data["verbs"].items() if verb[0] != "likes"]
    texts = {prompt.text for prompt in prompts(task)}
    assert len(texts) >= 200
    kinds = set()
    for prompt in prompts(task):
        subject, attractor = (prompt.text[slice(*prompt.spans[name])] for name in ("subject", "attractor"))
        number, other = subject not in plurals, attractor not in plurals
        assert list(prompt.answers) == [f" {verb[number]}" for verb in verbs]
        assert list(prompt.distractors) == [f" {verb[1 - number]}" for verb in verbs]
        changed = [
            pair for pair in zip(prompt.text.split(), prompt.counterfactual.split(), strict=True) if len(set(pair)) > 1
        ]
        assert len(changed) == 1
        assert tuple(sorted(changed[0])) in {tuple(sorted(pair)) for pair in plurals.items()}
        assert changed[0][0] == subject
        assert prompt.counterfactual in texts
        kinds.add((number, other))
    assert len(kinds) == 4


def test_a_subject_is_in_one_stream(words_lm: LMSpec) -> None:
    task = Agreement(lm=words_lm)
    plurals = read_data("agreement")["nouns"]
    singulars = {plural: noun for noun, plural in plurals.items()}
    subjects = {
        stream: {
            singulars.get(word, word)
            for prompt in task.streams[stream]
            for word in [prompt.text[slice(*prompt.spans["subject"])]]
        }
        for stream in ("train", "validation", "test")
    }
    assert sum(map(len, subjects.values())) == len(set().union(*subjects.values())) == len(plurals)


def test_tokenizers_without_the_words_are_refused() -> None:
    with pytest.raises(TaskError, match="task capitals cannot be posed to this tokenizer: none of its 496") as caught:
        Capitals()
    assert "496 rows: an answer with a word that this tokenizer does not know" in str(caught.value)
    assert "leave_out" not in str(caught.value)  # the user has no rows to mend
    with pytest.raises(TaskError, match=r"agreement cannot be posed to this tokenizer: 0 of the 31 nouns are single"):
        Agreement()
