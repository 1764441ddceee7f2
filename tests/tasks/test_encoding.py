import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, Gemma3Config, GPT2Config, PreTrainedTokenizerFast

from oa_train.errors import ModelError, TaskError
from oa_train.models.families import FAMILIES
from oa_train.models.spec import LMSpec
from oa_train.tasks.encoding import PromptEncoder, bos_token_id, load_tokenizer
from tests.builders import RARE, TINY_CONFIGS, tiny_model

SENTENCE = "Then Anna and Paul met at the park."


def test_bos_is_the_bos_token_else_the_eos_token_else_nothing(bytes_lm: LMSpec, letters_lm: LMSpec) -> None:
    tokenizer = load_tokenizer(bytes_lm)
    assert bos_token_id(bytes_lm, tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert bos_token_id(dataclasses.replace(bytes_lm, bos="none"), tokenizer) is None
    without = load_tokenizer(letters_lm)
    assert bos_token_id(letters_lm, without) is None
    without.eos_token = "z"
    assert bos_token_id(letters_lm, without) == without.convert_tokens_to_ids("z")


def test_bos_stands_once_in_front(lm: LMSpec) -> None:
    encoder, without = PromptEncoder.of(lm), PromptEncoder.of(dataclasses.replace(lm, bos="none"))
    with_bos, plain = encoder.encode(["Then Anna"])[0], without.encode(["Then Anna"])[0]
    assert with_bos == [encoder.bos, *plain]
    assert encoder.bos not in plain
    assert encoder.encode([]) == []


def test_what_was_encoded_decodes_to_the_text(lm: LMSpec) -> None:
    encoder = PromptEncoder.of(lm)
    assert encoder.tokenizer.decode(encoder.encode([SENTENCE])[0][1:]) == SENTENCE


def test_padding_fills_the_side_that_is_asked_for(digits_lm: LMSpec) -> None:
    encoder = PromptEncoder.of(digits_lm)
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
    assert PromptEncoder.of(letters_lm).padding == 0


def test_a_continuation_is_the_token_that_the_whole_text_ends_in(lm: LMSpec) -> None:
    encoder = PromptEncoder.of(lm)
    for text in ("Then, Anna and Paul met at the park. Paul handed the ring to", "Words: river stone"):
        before, after = encoder.encode([text, f"{text} Mary"])
        assert after == [*before, encoder.continuation(text, " Mary")]


def test_single_tokens_are_judged_after_a_space(bytes_lm: LMSpec) -> None:
    encoder = PromptEncoder.of(bytes_lm)
    assert len(encoder.tokenizer.tokenize("Anna")) > 1
    assert encoder.is_single_token("Anna")
    assert not any(encoder.is_single_token(word) for word in RARE)


def test_an_unknown_word_is_no_token() -> None:
    encoder = PromptEncoder.of(LMSpec())
    assert not encoder.is_single_token("Zebedee")
    assert encoder.continuation("the year 17", "32") is not None
    assert encoder.continuation("the year 17", " Zebedee") is None


def test_a_piece_that_changes_what_stands_before_is_no_continuation(bytes_lm: LMSpec) -> None:
    encoder = PromptEncoder.of(bytes_lm)
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
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer), None, 30)
    # "ab" is one token, "abc" is "a" and "bc": one token more, but not the same ones before.
    assert encoder.encode(["ab", "abc", "cc"]) == [[21], [letters["a"], 20], [letters["c"]] * 2]
    assert encoder.continuation("a ab", "c") is None
    assert encoder.continuation("a c", "c") == letters["c"]
    assert encoder.continuation("a ab", "c") is None


def test_a_folder_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer(LMSpec("./no/such/folder"))


def test_a_text_that_begins_with_the_bos_gets_no_second_one(bytes_lm: LMSpec) -> None:
    encoder = PromptEncoder.of(bytes_lm)
    texts = ["<|endoftext|>Then Anna", "Then Anna", "Then<|endoftext|> Anna"]
    rows = encoder.encode(texts)
    assert rows[0] == rows[1]
    assert rows[2].count(encoder.bos) == 2
    for side in ("left", "right"):
        tokens, mask = encoder.pad(rows, side)
        protected = encoder.protected(tokens, mask)
        assert protected.sum(dim=1).tolist() == [1, 1, 1]
        # The padding token is the same one, and stands in front on the left.
        assert torch.equal(protected, mask & (mask.long().cumsum(dim=1) == 1))


def test_without_bos_nothing_is_protected(bytes_lm: LMSpec) -> None:
    encoder = PromptEncoder.of(dataclasses.replace(bytes_lm, bos="none"))
    tokens, mask = encoder.pad(encoder.encode(["<|endoftext|>Then Anna"]), "right")
    assert not encoder.protected(tokens, mask).any()


def covered(encoder: PromptEncoder, text: str, span: tuple[int, int] | str) -> list[str]:
    (flags,) = encoder.span_flags([text], [{"it": span}])
    tokens = encoder.encode([text])[0]
    assert len(flags["it"]) == len(tokens)
    return [encoder.tokenizer.decode([token]) for token, inside in zip(tokens, flags["it"], strict=True) if inside]


@pytest.mark.parametrize("bos", ["auto", "none"])
def test_spans_are_the_tokens_that_they_share_characters_with(lm: LMSpec, bos: str) -> None:
    encoder = PromptEncoder.of(dataclasses.replace(lm, bos=bos))
    place = SENTENCE.index("Paul")
    for span in ((place, place + 4), "Paul", " Paul", "aul", "Paul ", (place + 1, place + 2)):
        assert [token.strip() for token in covered(encoder, SENTENCE, span)] == ["Paul"]
    assert [token.strip() for token in covered(encoder, SENTENCE, "Anna and Paul")] == ["Anna", "and", "Paul"]
    assert covered(encoder, SENTENCE, (len(SENTENCE) - 1, len(SENTENCE))) == ["."]


def test_spans_cover_all_tokens_of_a_split_word(bytes_lm: LMSpec) -> None:
    encoder, text = PromptEncoder.of(bytes_lm), "Then Anthony met Zoë"
    assert len(covered(encoder, text, "Anthony")) > 1
    assert "".join(covered(encoder, text, "Anthony")) == " Anthony"
    assert len(covered(encoder, text, "ë")) == 2  # two bytes, each a token


@pytest.mark.parametrize(
    ("span", "problem"),
    [
        ("Mary", r"is 'Mary', which occurs 0 times in it; expected once"),
        ("a", r"is 'a', which occurs 5 times .* as \[start, end\]"),
        ("", r"is '', which occurs \d+ times"),
        ((-1, 3), r"is \[-1, 3\]; expected 0 <= start < end <= 35"),
        ((4, 4), r"is \[4, 4\]; expected 0 <="),
        ((5, 36), r"is \[5, 36\]; expected 0 <="),
        ((4, 5), r"is ' ', which is part of no token"),
    ],
)
def test_spans_that_are_no_part_of_the_text_are_refused(span: tuple[int, int] | str, problem: str) -> None:
    with pytest.raises(TaskError, match=rf"The span 'it' of the prompt '{SENTENCE}' {problem}"):
        PromptEncoder.of(LMSpec()).span_flags([SENTENCE], [{"it": span}])


def test_a_span_of_the_bos_alone_is_refused(bytes_lm: LMSpec) -> None:
    encoder, text = PromptEncoder.of(bytes_lm), "<|endoftext|>Then Anna"
    with pytest.raises(TaskError, match=r"is '<\|endoftext\|>', which is the beginning-of-sequence token"):
        encoder.span_flags([text], [{"it": (0, 13)}])
    assert covered(encoder, text, (0, 17)) == ["<|endoftext|>", "Then"]
    without = PromptEncoder.of(dataclasses.replace(bytes_lm, bos="none"))
    assert covered(without, text, (0, 13)) == ["<|endoftext|>"]


def test_a_tokenizer_without_offsets_has_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PromptEncoder.of(LMSpec())
    monkeypatch.setattr(type(encoder.tokenizer), "is_fast", False)
    with pytest.raises(TaskError, match=r"name spans \(it\), and this tokenizer is a slow one .*fast tokenizer"):
        encoder.span_flags([SENTENCE], [{"it": "Anna"}])
    assert encoder.span_flags([SENTENCE], [{}]) == [{}]


def added_token(kind: str, **special: str) -> PromptEncoder:
    """An encoder whose tokenizer got a token that the embedding was not resized for."""
    tokenizer = load_tokenizer(LMSpec())
    size = len(tokenizer)
    tokenizer.add_special_tokens(special)
    assert getattr(tokenizer, f"{kind}_token_id") == size
    return PromptEncoder(tokenizer, bos_token_id(LMSpec(), tokenizer), size)


def test_a_padding_token_outside_the_embedding_is_not_used() -> None:
    encoder = added_token("pad", pad_token="[PAD]")
    assert encoder.padding == encoder.tokenizer.eos_token_id < encoder.vocabulary_size
    both = added_token("eos", eos_token="[END]", pad_token="[END]")
    assert both.padding == 0
    assert both.pad([[5, 6], [7]], "right")[0].tolist() == [[5, 6], [7, 0]]


def test_a_bos_outside_the_embedding_is_refused() -> None:
    with pytest.raises(ModelError, match=r"token '\[BOS\]' has the id (\d+), but the model's embedding has \1 rows"):
        added_token("bos", bos_token="[BOS]")


def test_a_token_outside_the_embedding_is_refused() -> None:
    encoder = added_token("pad", pad_token="[PAD]")
    message = r"token '\[PAD\]' of the prompt 'Then \[PAD\] Anna' has the id (\d+), .*vocabulary has \1 tokens"
    with pytest.raises(TaskError, match=message):
        encoder.encode(["Then Anna", "Then [PAD] Anna"])
    assert encoder.continuation("Then", "[PAD]") is None


def test_the_size_of_the_embedding_is_that_of_the_text_model(
    bytes_lm: LMSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PromptEncoder.of(bytes_lm).vocabulary_size == GPT2Config().vocab_size
    nested = Gemma3Config(text_config={"vocab_size": 1300})
    monkeypatch.setattr("oa_train.tasks.encoding.load_config", lambda spec: nested)
    assert PromptEncoder.of(bytes_lm).vocabulary_size == 1300


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    load_tokenizer(LMSpec()).save_pretrained(tmp_path)
    GPT2Config(vocab_size=200, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer has \d+ tokens, but the model's embedding has 200 rows"):
        PromptEncoder.of(LMSpec(str(tmp_path)))


TABLES = {"gpt2", "gpt_neo", "gptj", "opt"}


@pytest.mark.parametrize("family", sorted(TABLES))
def test_prompts_longer_than_the_table_of_positions_are_refused(tmp_path: Path, family: str) -> None:
    load_tokenizer(LMSpec()).save_pretrained(tmp_path)
    AutoConfig.for_model(family, max_position_embeddings=7).save_pretrained(tmp_path)
    encoder = PromptEncoder.of(LMSpec(str(tmp_path)))
    rows = encoder.encode(["Then Anna and", "Then Anna and Paul met at", "Then Anna and Paul met at the"])
    assert [len(row) for row in rows] == [4, 7, 8]
    encoder.pad(rows[:2], "left")
    with pytest.raises(TaskError, match=r"A prompt has 8 tokens, but the model has 7 positions .* Anna and Paul"):
        encoder.pad(rows, "left")


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_run_prompts_of_any_length_refuse_none(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, torch.float32)
    load_tokenizer(LMSpec()).save_pretrained(tmp_path)
    AutoConfig.for_model(family, **TINY_CONFIGS[family]).save_pretrained(tmp_path)
    assert (PromptEncoder.of(LMSpec(str(tmp_path))).n_positions is None) == (family not in TABLES)
    longer = torch.ones(1, getattr(model.config, "max_position_embeddings", 64) + 1, dtype=torch.long)
    with pytest.raises((IndexError, RuntimeError)) if family in TABLES else nullcontext():
        model(input_ids=longer)
