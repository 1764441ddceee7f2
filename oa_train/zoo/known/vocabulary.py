"""The words of hand-written models: single letters and digits, each a token."""

from collections.abc import Sequence

import torch

from oa_train.zoo.known.wiring import Wiring

LETTERS = tuple("abcdefgh")
BOTH_CASES = (*LETTERS, *(letter.upper() for letter in LETTERS))
# The words of arithmetic modulo their number.
DIGITS = tuple("01234")

# Logit of the answer, where those of all other tokens are 0.
CONFIDENCE = 12.0

BOS, PAD, UNKNOWN = "<bos>", "<pad>", "<unk>"
SPECIAL = (BOS, PAD, UNKNOWN)


def special_settings(words: Sequence[str]) -> dict[str, int]:
    """What a model's configuration says of its vocabulary, which is the special tokens and then the words."""
    return {
        "vocab_size": len(SPECIAL) + len(words),
        "bos_token_id": SPECIAL.index(BOS),
        "eos_token_id": SPECIAL.index(BOS),
        "pad_token_id": SPECIAL.index(PAD),
    }


def embed_words(wiring: Wiring, words: Sequence[str], generator: torch.Generator) -> None:
    """Give every word a dimension of `token`, 1 in `one`, a random `coin` and random numbers in `rest`.

    The beginning of a prompt is 1 in `one` as well; nothing else is written by special tokens. Coins show both sides
    equally often, so that their mean is near zero.

    Args:
        wiring: of the model.
        words: in the order of `token`.
        generator: draws coins and junk.
    """
    spaces, table = wiring.spaces, wiring.weights.embedding[len(SPECIAL) :]
    wiring.weights.embedding[SPECIAL.index(BOS), spaces["one"]] = 1
    coins = torch.arange(len(words)) % 2 * 2.0 - 1
    table[:, spaces["token"]] = torch.eye(len(words))
    table[:, spaces["one"]] = 1
    table[:, spaces["coin"]] = coins[torch.randperm(len(words), generator=generator)].unsqueeze(1)
    table[:, spaces["rest"]] = 0.5 * torch.randn(len(words), spaces.size("rest"), generator=generator)


def unembed_words(wiring: Wiring, words: Sequence[str], outputs: Sequence[str]) -> None:
    """Let the logits of words read `output`; the logits of all others are 0.

    Args:
        wiring: of the model.
        words: in the order of their ids.
        outputs: the words that can be answers, in the order of the dimensions that they read.
    """
    for number, word in enumerate(outputs):
        row = len(SPECIAL) + list(words).index(word)
        wiring.weights.unembedding[row] = CONFIDENCE * wiring.vector("output", number)
