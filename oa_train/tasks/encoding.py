"""The one place where tasks meet a tokenizer: loading it, the BOS rule, encoding, padding, single tokens."""

from collections.abc import Sequence
from typing import Literal

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from oa_train.errors import ModelError
from oa_train.models.loading import LMSpec, builtin_models, locate
from oa_train.shapes import Bool, Int, Tensor

PaddingSide = Literal["left", "right"]
Tokenizer = PreTrainedTokenizerBase

# An ordinary word in front of a probe. Tokenizers write the first word of a text in another way than the
# words after a space, and it is the second kind that stands in the middle of a prompt.
CONTEXT = "Then"


def load_tokenizer(spec: LMSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Raises:
        ModelError: there is no such tokenizer, it cannot be reached, or its files are damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**locate(spec))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, RuntimeError) as problem:
        raise _not_loaded(spec, problem) from problem
    except Exception as problem:  # the tokenizers library reports a damaged file as a bare Exception
        if type(problem) is Exception:
            raise _not_loaded(spec, problem) from problem
        raise
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # transformers makes an empty tokenizer for some families when their files are missing.
        raise _not_loaded(spec, "it has no words, so its files are missing or empty.")
    return tokenizer


def word_tokenizer(words: Sequence[str], bos: str, pad: str, unknown: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of words between spaces.

    Args:
        words: in the order of their ids, behind the three special tokens.
        bos: the token of id 0.
        pad: the token of id 1.
        unknown: the token of id 2, for all other words.
    """
    pieces = [bos, pad, unknown, *(f"▁{word}" for word in words)]
    tokenizer = FastTokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=bos, pad_token=pad, unk_token=unknown
    )


def bos_token_id(spec: LMSpec, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that stands in front of every prompt, or None when there is none.

    Args:
        spec: the model; its `bos` is the rule.
        tokenizer: the model's tokenizer.
    """
    if spec.bos == "none":
        return None
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if first is None else int(first)


class PromptEncoder:
    """Turns prompts into token ids.

    Args:
        tokenizer: the model's tokenizer.
        bos: id that is put in front of every prompt; None for nothing.

    Attributes:
        tokenizer: the model's tokenizer.
        bos: id that is put in front of every prompt; None for nothing.
        padding: id that fills padded columns. Any id will do, because those columns are masked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: int | None) -> None:
        self.tokenizer = tokenizer
        self.bos = bos
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.padding = int(next(token for token in candidates if token is not None))
        self._continuations: dict[tuple[str, str], int | None] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts without the tokenizer's own special tokens, with the BOS id in front."""
        if not texts:
            return []
        start = [] if self.bos is None else [self.bos]
        return [start + ids for ids in self._plain(texts)]

    def pad(
        self, rows: Sequence[Sequence[int]], side: PaddingSide
    ) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
        """Put rows of different length into one tensor.

        Args:
            rows: token ids of each prompt.
            side: where shorter rows are filled up.

        Returns:
            Token ids, and a mask that is True at real tokens.
        """
        width = max(len(row) for row in rows)
        tokens = torch.full((len(rows), width), self.padding, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, row in enumerate(rows):
            columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            tokens[number, columns] = torch.tensor(row, dtype=torch.long)
            mask[number, columns] = True
        return tokens, mask

    def continuation(self, text: str, piece: str) -> int | None:
        """Id of the one token by which `piece` continues `text`.

        Only the last word of `text` can change how `piece` is written, so the answer is looked up by that word.

        Args:
            text: what stands before.
            piece: what follows, with its leading space if it has one (" Anna", "32").

        Returns:
            The id; None when `piece` is several tokens, changes the tokens before it, or is unknown.
        """
        last_word = text.rsplit(maxsplit=1)[-1] if text.strip() else ""
        key = (last_word, piece)
        if key not in self._continuations:
            self._continuations[key] = self._probe(f"{CONTEXT} {last_word}".rstrip(), piece)
        return self._continuations[key]

    def is_single_token(self, word: str) -> bool:
        """Whether a word is one token after a space in the middle of a sentence."""
        return self.continuation("", f" {word}") is not None

    def _probe(self, context: str, piece: str) -> int | None:
        before, after = self._plain([context, context + piece])
        if after[:-1] != before or len(after) != len(before) + 1:
            return None
        # A token for unknown words, declared as such or not, does not give the word back.
        return after[-1] if str(self.tokenizer.decode(after[-1:])).strip() == piece.strip() else None

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids


def _not_loaded(spec: LMSpec, problem: Exception | str) -> ModelError:
    first = str(problem).strip().split("\n")[0]
    return ModelError(
        f"The tokenizer of {spec.name!r} cannot be loaded: {first}\n"
        f"Expected a built-in model ({', '.join(sorted(builtin_models())) or 'none found'}), a local directory "
        "with the model's tokenizer files beside its weights, or the id of a model on the Hub that this machine "
        "can reach."
    )
