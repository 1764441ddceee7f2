"""Tokenizers of three kinds, trained on the spot: whole words, byte-level BPE as in GPT-2, and one like Llama's."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from oa_train.models.spec import LMSpec
from tests.builders import byte_level_tokenizer, training_text


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig) -> LMSpec:
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return LMSpec(str(folder))


@pytest.fixture(scope="session")
def bytes_lm(tmp_path_factory: pytest.TempPathFactory) -> LMSpec:
    return save(tmp_path_factory.mktemp("bytes"), byte_level_tokenizer(), GPT2Config())


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
    tokenizer.decoder = decoders.ByteLevel()
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
