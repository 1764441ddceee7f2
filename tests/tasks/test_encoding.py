import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oa_train.errors import ModelError
from oa_train.models.loading import LMSpec
from oa_train.tasks.encoding import PromptEncoder, bos_token_id, load_tokenizer, word_tokenizer
from tests.builders import RARE


def encoder_of(lm: LMSpec) -> PromptEncoder:
    tokenizer = load_tokenizer(lm)
    return PromptEncoder(tokenizer, bos_token_id(lm, tokenizer))


def test_bos_is_the_bos_token_else_the_eos_token_else_nothing(bytes_lm: LMSpec, letters_lm: LMSpec) -> None:
    tokenizer = load_tokenizer(bytes_lm)
    assert bos_token_id(bytes_lm, tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert bos_token_id(dataclasses.replace(bytes_lm, bos="none"), tokenizer) is None
    without = load_tokenizer(letters_lm)
    assert bos_token_id(letters_lm, without) is None
    without.eos_token = "z"
    assert bos_token_id(letters_lm, without) == without.convert_tokens_to_ids("z")


def test_bos_stands_once_in_front(lm: LMSpec) -> None:
    encoder = encoder_of(lm)
    with_bos, plain = encoder.encode(["Then Anna"])[0], PromptEncoder(encoder.tokenizer, None).encode(["Then Anna"])[0]
    assert with_bos == [encoder.bos, *plain]
    assert encoder.bos not in plain
    assert encoder.encode([]) == []


def test_what_was_encoded_decodes_to_the_text(lm: LMSpec) -> None:
    encoder = encoder_of(lm)
    text = "Then Anna and Paul met at the park."
    assert encoder.tokenizer.decode(encoder.encode([text])[0][1:]) == text


def test_padding_fills_the_side_that_is_asked_for(digits_lm: LMSpec) -> None:
    encoder = encoder_of(digits_lm)
    end = encoder.tokenizer.eos_token_id
    assert end > 0
    assert encoder.padding == end  # this tokenizer has no pad token
    tokens, mask = encoder.pad([[5, 6, 7], [8]], "right")
    assert tokens.tolist() == [[5, 6, 7], [8, end, end]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    tokens, mask = encoder.pad([[5, 6, 7], [8]], "left")
    assert tokens.tolist() == [[5, 6, 7], [end, end, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert tokens.dtype == torch.long
    assert mask.dtype == torch.bool


def test_padding_without_pad_and_eos_token(letters_lm: LMSpec) -> None:
    assert encoder_of(letters_lm).padding == 0


def test_a_continuation_is_the_token_that_the_whole_text_ends_in(lm: LMSpec) -> None:
    encoder = encoder_of(lm)
    for text in ("Then, Anna and Paul met at the park. Paul handed the ring to", "Words: river stone"):
        before, after = encoder.encode([text, f"{text} Mary"])
        assert after == [*before, encoder.continuation(text, " Mary")]


def test_single_tokens_are_judged_after_a_space(bytes_lm: LMSpec) -> None:
    encoder = encoder_of(bytes_lm)
    assert len(encoder.tokenizer.tokenize("Anna")) > 1
    assert encoder.is_single_token("Anna")
    assert not any(encoder.is_single_token(word) for word in RARE)


def test_an_unknown_word_is_no_token() -> None:
    encoder = encoder_of(LMSpec())
    assert not encoder.is_single_token("Zebedee")
    assert encoder.continuation("the year 17", "32") is not None
    assert encoder.continuation("the year 17", " Zebedee") is None


def test_a_piece_that_changes_what_stands_before_is_no_continuation(bytes_lm: LMSpec) -> None:
    encoder = encoder_of(bytes_lm)
    assert encoder.continuation("Then Ann", "a") is None
    assert encoder.continuation("", " Anna") is not None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ModelError, match=r"The tokenizer of '.*' cannot be loaded: (.|\n)*tokenizer files"):
        load_tokenizer(LMSpec(str(tmp_path)))


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(LMSpec(str(tmp_path)))


def test_what_stands_before_decides() -> None:
    letters = {letter: number for number, letter in enumerate("Thenabcd Ġ")}
    merges = [("b", "c"), ("a", "b")]
    bpe = models.BPE(letters | {"bc": 20, "ab": 21}, merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer), None)
    # "ab" is one token, "abc" is "a" and "bc": one token more, but not the same ones before.
    assert encoder.encode(["ab", "abc", "cc"]) == [[21], [letters["a"], 20], [letters["c"]] * 2]
    assert encoder.continuation("a ab", "c") is None
    assert encoder.continuation("a c", "c") == letters["c"]
    assert encoder.continuation("a ab", "c") is None


def test_a_folder_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer(LMSpec("./no/such/folder"))


def test_a_tokenizer_of_words_knows_them_and_no_others() -> None:
    tokenizer = word_tokenizer(["b", "B", "10"], "<bos>", "<pad>", "<unk>")
    assert tokenizer("10 b B c b")["input_ids"] == [5, 3, 4, 2, 3]
    assert tokenizer.decode([5, 3, 4]) == "10 b B"
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    encoder = PromptEncoder(tokenizer, 0)
    assert [encoder.is_single_token(word) for word in ("b", "10", "c")] == [True, True, False]
