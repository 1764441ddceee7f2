import random
import re

import pytest

from oa_train.errors import ConfigurationError, TaskError
from oa_train.models.spec import LMSpec
from oa_train.tasks import IOI, Prompt
from oa_train.tasks.vocabulary import read_data, read_words
from tests.builders import RARE

NAMES = set(read_words("names"))


def people(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in NAMES]


def prompts(task: IOI, number: int = 400) -> list[Prompt]:
    return [task.prompt("train", index) for index in range(number)]


def test_the_subject_is_named_twice_and_the_indirect_object_once(lm: LMSpec) -> None:
    for prompt in prompts(IOI(lm=lm)):
        named = people(prompt.text)
        answer, subject = prompt.answers[0].strip(), prompt.distractors[0].strip()
        assert named.count(answer) == 1
        assert named.count(subject) == 2
        assert named[-1] == subject
        assert len(named) in (3, 4)
        assert prompt.text.endswith((" to", " sorry to"))
        assert "{" not in prompt.text


def test_spans_are_the_mentions_of_the_two_people() -> None:
    for prompt in prompts(IOI()):
        answer, subject = prompt.answers[0].strip(), prompt.distractors[0].strip()
        mentions = [match.span() for match in re.finditer(rf"\b{subject}\b", prompt.text)]
        assert [prompt.spans["S1"], prompt.spans["S2"]] == mentions
        assert prompt.spans["IO"] == re.search(rf"\b{answer}\b", prompt.text).span()
        assert list(prompt.spans) == ["IO", "S1", "S2", "end"]


def test_the_counterfactual_names_three_new_people() -> None:
    for prompt in prompts(IOI()):
        before, after = prompt.text.split(), prompt.counterfactual.split()
        changed = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
        new = {other.strip(".,") for _, other in changed}
        assert len(changed) == len(new) == 3
        assert new <= NAMES
        assert not new & set(people(prompt.text))


def test_orders() -> None:
    def subject_first(prompt: Prompt) -> bool:
        named = people(prompt.text)
        return named.index(prompt.distractors[0].strip()) < named.index(prompt.answers[0].strip())

    assert not any(map(subject_first, prompts(IOI(order="ABBA"))))
    assert all(map(subject_first, prompts(IOI(order="BABA"))))
    assert 150 < sum(map(subject_first, prompts(IOI()))) < 250


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.5, 150, 250), (1.0, 400, 400)])
def test_distractor_names_come_with_their_probability(probability: float, low: int, high: int) -> None:
    drawn = prompts(IOI(distractor_names=probability))
    with_third = [prompt for prompt in drawn if len(people(prompt.text)) == 4]
    assert low <= len(with_third) <= high
    if with_third:
        places = [bool(re.search(r"near the office of|behind the house of", prompt.text)) for prompt in with_third]
        assert 0.3 < sum(places) / len(places) < 0.7


def test_every_template_name_place_and_object_is_used() -> None:
    task = IOI()
    words = {word for prompt in prompts(task, 2000) for word in re.findall(r"\w+", prompt.text)}
    assert {*task.names, *task.places, *task.objects} <= words
    data = read_data("templates")
    groups = [data[name] for name in ("openings", "openings_with_name", "places_with_name", "templates")]
    sentences = [word for group in groups for text in group for word in text.split()]
    assert {word.strip(".,") for word in sentences if "{" not in word} <= words


def test_every_template_has_its_slots_once() -> None:
    for template in IOI().templates:
        slots = re.findall(r"\{(\w+)\}", template)
        assert {"opening", "A", "B", "S", "place"} <= set(slots)
        assert len(set(slots)) == len(slots)
        # The first words of a text are written in another way than those after a space.
        assert template.startswith("{opening} ")


def test_split_words_are_never_drawn(bytes_lm: LMSpec) -> None:
    task = IOI(lm=bytes_lm)
    texts = " ".join(prompt.text + prompt.counterfactual for prompt in prompts(task, 2000))
    assert not RARE & set(re.findall(r"\w+", texts))
    assert len(task.names) == len(NAMES) - 1


def test_a_probability_is_between_zero_and_one() -> None:
    with pytest.raises(ConfigurationError, match=r"distractor_names is 1.5; expected a probability from 0 to 1"):
        IOI(distractor_names=1.5)


def test_a_tokenizer_without_names_is_refused(letters_lm: LMSpec) -> None:
    with pytest.raises(TaskError, match=r"0 of the 105 words of its list 'names' .*at least 6"):
        IOI(lm=letters_lm)


def test_sentences_of_the_literature_name_two_people_and_use_every_template() -> None:
    task = IOI(sentences="literature")
    drawn = prompts(task)
    assert {len(people(prompt.text)) for prompt in drawn} == {3}
    scenes = [task.draw_scene(random.Random(number)) for number in range(400)]
    assert {scene.template for scene in scenes} == set(read_data("ioi_literature"))
    assert task.describe()["sentences"] == "literature"


def test_the_literature_has_no_bystanders() -> None:
    with pytest.raises(ConfigurationError, match="name two people only"):
        IOI(sentences="literature", distractor_names=0.5)
