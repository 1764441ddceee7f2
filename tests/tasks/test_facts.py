"""The tasks of facts: well-known ones for any tokenizer, and invented ones that the built-in model `facts` knows."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import get_args

import pytest

from oa_train.cli.main import main
from oa_train.errors import ConfigurationError, TaskError, UnknownNameError
from oa_train.models.spec import LMSpec
from oa_train.tasks import Facts, SyntheticFacts
from oa_train.tasks.fact_records import FactRecords
from oa_train.tasks.task import Prompt, Stream
from oa_train.tasks.vocabulary import read_data

DATA = read_data("facts")
SYNTHETIC = read_data("synthetic_facts")
LM = LMSpec("facts")


@pytest.fixture(scope="module")
def synthetic() -> SyntheticFacts:
    return SyntheticFacts(lm=LM)


@pytest.fixture(scope="module")
def letters(letters_lm: LMSpec) -> Facts:
    return Facts(lm=letters_lm)


@pytest.fixture(params=["letters", "synthetic"])
def task(request: pytest.FixtureRequest) -> FactRecords:
    return request.getfixturevalue(request.param)


def subject_of(prompt: Prompt) -> str:
    return prompt.text[slice(*prompt.spans["subject"])]


def relation_and_other(task: FactRecords, prompt: Prompt) -> tuple[str, str]:
    """Relation of a prompt, and the subject of its counterfactual, by comparing texts with sentences."""
    text, counterfactual = prompt.text.rstrip(), prompt.counterfactual.rstrip()
    for relation, sentences in task.sentences().items():
        for sentence in sentences:
            before, after = sentence.split("{subject}")
            if text == before + subject_of(prompt) + after:
                assert counterfactual.startswith(before)
                assert counterfactual.endswith(after)
                return relation, counterfactual.removeprefix(before).removesuffix(after)
    raise AssertionError(text)


def distinct(task: FactRecords) -> list[Prompt]:
    return list({prompt.text: prompt for prompts in task.streams.values() for prompt in prompts}.values())


def test_the_list_is_large_and_no_object_can_be_copied_from_its_subject() -> None:
    facts = {relation: content["facts"].items() for relation, content in DATA.items()}
    assert sum(map(len, facts.values())) >= 240
    assert {"capital", "language", "currency"} <= facts.keys()
    del facts["language"]  # languages are named after countries, as Germany's
    pairs = [pair for known in facts.values() for pair in known]
    assert not [(subject, names) for subject, names in pairs if any(name in subject for name in names.split("|"))]
    for content in DATA.values():
        assert 1 <= len(content["templates"]) <= 2
        for sentence in content["templates"]:
            before, after = sentence.split("{subject}")
            assert before.endswith(" ")  # tokenizers write the first word of a text differently
            assert after.strip()


def test_the_counterfactual_asks_the_same_of_another_subject(task: FactRecords) -> None:
    facts = task.facts()
    for prompt in distinct(task):
        relation, other = relation_and_other(task, prompt)
        assert other != subject_of(prompt)
        assert not set(facts[subject_of(prompt)][relation]) & set(facts[other][relation])
        row, counterfactual = task.encoder.encode([prompt.text, prompt.counterfactual])
        assert len(row) == len(counterfactual)
        right = {task.encoder.continuation(prompt.text, answer) for answer in prompt.answers}
        wrong = {task.encoder.continuation(prompt.text, answer) for answer in prompt.distractors}
        expected = [
            {task.encoder.encode([f"{prompt.text.rstrip()} {name}"])[0][len(row)] for name in facts[subject][relation]}
            for subject in (subject_of(prompt), other)
        ]
        assert [right, wrong] == expected
        assert not right & wrong


def test_a_subject_is_in_one_stream_with_all_its_facts(task: FactRecords) -> None:
    streams = defaultdict(set)
    relations = defaultdict(Counter)
    for stream in ("train", "validation", "test"):
        for prompt in task.streams[stream]:
            relation, other = relation_and_other(task, prompt)
            streams[subject_of(prompt)].add(stream)
            streams[other].add(stream)
            relations[subject_of(prompt)][relation] += 1
    assert all(len(used) == 1 for used in streams.values())
    for subject, counts in relations.items():
        assert counts == {relation: len(task.sentences()[relation]) for relation in task.facts()[subject]}


def test_the_spans_are_the_subject_and_the_last_token(task: FactRecords) -> None:
    batch = task.batch("test", 0, 16)
    assert batch.spans.keys() == {"subject", "end"}
    for row in range(16):
        tokens = batch.tokens[row]
        prompt = task.prompt("test", row)
        assert task.tokenizer.decode(tokens[batch.spans["subject"][row]]).strip() == subject_of(prompt)
        # Where the space before a word is a token of its own, it is scored and in no span.
        space = prompt.text.endswith(" ")
        assert (batch.spans["end"][row].nonzero().flatten() + space).tolist() == batch.scored[row].tolist()


def test_facts_of_some_relations(letters: Facts, letters_lm: LMSpec) -> None:
    some = Facts(lm=letters_lm, relations=["symbol", "capital"])
    assert some.relations == ("capital", "symbol")
    assert {relation_and_other(letters, prompt)[0] for prompt in distinct(some)} == {"capital", "symbol"}
    assert some.describe()["relations"] == ["capital", "symbol"]
    # A subject with fewer relations finds a partner more easily.
    assert len({subject_of(prompt) for prompt in distinct(some)}) <= 87
    assert len(distinct(letters)) > len(distinct(some)) > 100


def test_subjects_without_partner_and_long_objects_are_said(letters: Facts) -> None:
    alone, several, *_ = letters.remarks
    left_out = alone.partition("otherwise: ")[2].rstrip(".").split(", ")
    subjects = {subject for content in DATA.values() for subject in content["facts"]}
    assert alone.startswith(f"{len(left_out)} of {len(subjects)} subjects are left out, because no other one has as")
    assert set(left_out) == subjects - {subject_of(prompt) for prompt in distinct(letters)}
    assert "prompts have answers of several tokens, scored at the first that differs" in several


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_relation_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownNameError, match=r"no relation named 'capitol'. Did you mean capital\?"):
        Facts(lm=LM, relations=["language", "capitol"])
    with pytest.raises(ConfigurationError, match="relations is empty; expected some of capital, language"):
        Facts(lm=LM, relations=[])


def test_tokenizers_without_the_words_are_refused() -> None:
    with pytest.raises(TaskError, match=r"task facts cannot be posed to this tokenizer: none of its \d+ prompts can"):
        Facts()
    with pytest.raises(
        TaskError, match=r"synthetic_facts cannot be posed .*: 0 of the 240 people .*\(240 have .* know\)"
    ):
        SyntheticFacts()


def test_five_streams_share_no_person_and_none_is_asked_for_more_than_it_has(synthetic: SyntheticFacts) -> None:
    people = {stream: {subject_of(prompt) for prompt in synthetic.streams[stream]} for stream in get_args(Stream)}
    assert sum(map(len, people.values())) == len(set().union(*people.values())) == len(synthetic.facts())
    sizes = {stream: synthetic.size(stream) for stream in people}
    assert sum(sizes.values()) == 6 * len(synthetic.facts())
    assert (synthetic.n_validation, synthetic.n_test, synthetic.n_means) == (
        sizes["validation"],
        sizes["test"],
        sizes["means"],
    )
    assert synthetic.n_test >= 100
    assert not synthetic.remarks


def test_neither_name_tells_the_object(synthetic: SyntheticFacts) -> None:
    """The best guess from one of the names, made with all facts in view, is right for few of its people."""
    for place in (0, 1):
        for relation in SYNTHETIC["relations"]:
            objects = defaultdict(Counter)
            for person, known in synthetic.facts().items():
                objects[person.split()[place]][known[relation][0]] += 1
            right = sum(max(counts.values()) for counts in objects.values())
            assert right < 0.3 * len(synthetic.facts())
    facts = synthetic.facts()
    reversed_too = [
        person for person in facts if facts[person]["town"] == facts[" ".join(reversed(person.split()))]["town"]
    ]
    assert len(reversed_too) < 0.2 * len(facts)


def test_last_subject_first_later_and_last_are_tokens_apart(synthetic: SyntheticFacts) -> None:
    batch = synthetic.batch("test", 0, 64)
    for inside, end in zip(batch.spans["subject"], batch.spans["end"], strict=True):
        first, last = inside.nonzero().flatten().tolist()
        assert last == first + 1
        assert first > 1
        assert int(end.nonzero()) - last > 3


def test_the_command_line_shows_facts_and_refuses_unknown_relations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check-data", "--data", "SyntheticFacts", "--lm.name", "facts"]) == 0
    shown = capsys.readouterr().out
    assert "span subject" in shown
    assert shown.count("1.000 [") == 3
    assert main(["check-data", "--data", "Facts", "--data.relations", "[capitol]"]) == 2
    assert "Did you mean capital?" in capsys.readouterr().err
    assert main(["check-data", "--data", "SyntheticFacts"]) == 2
    assert "synthetic_facts cannot be posed to this tokenizer" in capsys.readouterr().err
