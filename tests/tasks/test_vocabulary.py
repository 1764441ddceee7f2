import pytest

from oa_train.errors import TaskError
from oa_train.models.spec import LMSpec
from oa_train.tasks.encoding import PromptEncoder
from oa_train.tasks.vocabulary import read_data, read_words, single_token_words
from tests.builders import RARE

LISTS = ("names", "places", "objects", "nouns", "induction")


@pytest.mark.parametrize("name", LISTS)
def test_lists_have_no_word_twice(name: str) -> None:
    words = read_words(name)
    assert len(set(words)) == len(words)
    assert all(word.isalpha() for word in words)


def test_no_name_is_a_word_of_another_list_or_of_a_sentence() -> None:
    others = {word for name in LISTS if name != "names" for word in read_words(name)}
    sentences = {word for group in read_data("templates").values() for text in group for word in text.split()}
    assert not set(read_words("names")) & (others | sentences)


def test_words_of_several_tokens_are_left_out(bytes_lm: LMSpec) -> None:
    encoder = PromptEncoder.of(bytes_lm)
    for name in LISTS:
        words = read_words(name)
        kept = single_token_words(encoder, "ioi", name, minimum=2)
        assert kept == tuple(word for word in words if word not in RARE)
        assert len(kept) == len(words) - 1


def test_too_few_words_are_refused_with_the_count(letters_lm: LMSpec) -> None:
    encoder = PromptEncoder.of(letters_lm)
    message = r"task ioi .*: 0 of the 12 words of its list 'places' are single tokens .*at least 3 .*\n.*another task"
    with pytest.raises(TaskError, match=message):
        single_token_words(encoder, "ioi", "places", minimum=3)
