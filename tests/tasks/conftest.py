"""Tokenizers of three kinds, trained on the spot: whole words, byte-level BPE as in GPT-2, and one like Llama's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from oa_train.models.loading import LMSpec
from oa_train.tasks.vocabulary import read_data, read_words

# Left out of the training text, so that the byte-level tokenizer splits them.
RARE = {"Anthony", "museum", "necklace", "rebellion", "velvet"}


def training_text() -> Iterator[str]:
    for name in ("names", "places", "objects", "nouns", "induction"):
        yield from (f"Then {word}, {word}." for word in read_words(name) if word not in RARE for _ in range(20))
    for sentences in read_data("templates").values():
        yield from sentences * 20
    yield from [f"Then {century}" for century in range(10, 19)] * 200
    yield from [f"{year:02d}" for year in range(100) if year != 55] * 100
    yield from ["The lasted from the year to the year", "Words: a"] * 20


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig) -> LMSpec:
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return LMSpec(str(folder))


@pytest.fixture(scope="session")
def bytes_lm(tmp_path_factory: pytest.TempPathFactory) -> LMSpec:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)
    return save(tmp_path_factory.mktemp("bytes"), fast, GPT2Config())


@pytest.fixture(scope="session")
def digits_lm(tmp_path_factory: pytest.TempPathFactory) -> LMSpec:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(training_text(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return save(tmp_path_factory.mktemp("digits"), fast, LlamaConfig())


@pytest.fixture(scope="session")
def letters_lm(tmp_path_factory: pytest.TempPathFactory) -> LMSpec:
    """One token a byte: no word is whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return save(tmp_path_factory.mktemp("letters"), fast, GPT2Config())


@pytest.fixture(scope="session", params=["tiny", "bytes", "digits"])
def lm(request: pytest.FixtureRequest) -> LMSpec:
    """A model with each kind of tokenizer in turn."""
    return LMSpec() if request.param == "tiny" else request.getfixturevalue(f"{request.param}_lm")
