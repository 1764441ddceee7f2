"""Tokenizers of whole words, for the models that are made here."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# The first ids of every vocabulary.
BOS, PAD, UNKNOWN = SPECIAL = ("<bos>", "<pad>", "<unk>")


def word_tokenizer(pieces: Sequence[str], split: pre_tokenizers.PreTokenizer | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are whole pieces of text.

    Args:
        pieces: the tokens, in the order of their ids after the special tokens; `▁` is the space before a word.
        split: how texts are split into pieces; at spaces by default.
    """
    ids = {piece: number for number, piece in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split or pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=PAD, unk_token=UNKNOWN
    )
