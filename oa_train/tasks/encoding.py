"""Tokenizers, and the encoding of prompts: BOS, padding, spans, protected tokens, single-token words."""

import unicodedata
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from oa_train.batches import leading_tokens
from oa_train.errors import ModelError, TaskError
from oa_train.models.loading import load_config
from oa_train.models.model_files import loading, locate
from oa_train.models.spec import LMSpec
from oa_train.shapes import Bool, Int, Tensor

PaddingSide = Literal["left", "right"]
Tokenizer = PreTrainedTokenizerBase

# Part of a text: index of its first character and of the one after its last, or a substring that occurs once.
Span = tuple[int, int] | str

# An ordinary word in front of a probe: tokenizers encode the first word of a text differently from words after a
# space, and most words of a prompt follow a space.
CONTEXT = "Then"

# Characters that are followed (opening) or preceded (closing) by a word without a space.
OPENING = "([{<“‘«„$£€#@/\\-–_^~*"  # noqa: RUF001
CLOSING = ".,;:!?)]}>”’»%'\"-–/"  # noqa: RUF001


def load_tokenizer(spec: LMSpec) -> Tokenizer:
    """Load the tokenizer that belongs to a model.

    Raises:
        ModelError: the tokenizer does not exist or cannot be downloaded, or its files are damaged.
    """
    with loading("tokenizer of", spec):
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(**locate(spec))
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            # transformers makes an empty tokenizer for some families when their files are missing.
            raise ValueError("it has no words, so its files are missing or empty.")
    return tokenizer


def bos_token_id(spec: LMSpec, tokenizer: Tokenizer) -> int | None:
    """Id of the token in front of every prompt by the rule `spec.bos`; None if there is none."""
    if spec.bos == "none":
        return None
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if first is None else int(first)


class PromptEncoder:
    """Turns prompts into token ids.

    Args:
        tokenizer: the model's tokenizer.
        bos: id of the token in front of every prompt; None for none.
        vocabulary_size: number of rows of the model's embedding.
        n_positions: rows of the model's position embedding; None for a model without one (rotary embeddings).
        context_length: length in tokens of the longest text the model was made for; `n_positions` by default.

    Attributes:
        padding: id that fills padded columns. Any id of the embedding will do, because those columns are masked.

    Raises:
        ModelError: the tokenizer, or the BOS token, has ids without a row in the embedding. Other tokens that were
            added to the tokenizer alone are refused when a prompt uses them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        bos: int | None,
        vocabulary_size: int,
        n_positions: int | None = None,
        context_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.bos = bos
        self.vocabulary_size = vocabulary_size
        self.n_positions = n_positions
        self.context_length = n_positions if context_length is None else context_length
        if bos is not None and bos >= vocabulary_size:
            raise ModelError(
                f"The beginning-of-sequence token {tokenizer.convert_ids_to_tokens(bos)!r} has the id {bos}, but the "
                f"model's embedding has {vocabulary_size} rows. The tokenizer belongs to another model, or got tokens "
                "that the embedding was not resized for. Use the model's own tokenizer, or lm.bos: none."
            )
        if tokenizer.vocab_size > vocabulary_size:
            raise ModelError(
                f"The tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding has {vocabulary_size} "
                "rows: the tokenizer belongs to another model. Use the model's own tokenizer files."
            )
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.padding = next(int(token) for token in candidates if token is not None and token < vocabulary_size)
        self._continuations: dict[tuple[str, str], int | None] = {}

    @classmethod
    def of(cls, spec: LMSpec) -> "PromptEncoder":
        """The encoder of a model's prompts.

        Raises:
            ModelError: the tokenizer or the configuration cannot be loaded, or the two do not fit together.
        """
        tokenizer, config = load_tokenizer(spec), load_config(spec).get_text_config()
        # Rotary models compute positions; all others look them up in an embedding.
        rotary = getattr(config, "rope_parameters", None)
        context_length = getattr(config, "max_position_embeddings", None)
        n_positions = None if rotary else context_length
        return cls(tokenizer, bos_token_id(spec, tokenizer), config.vocab_size, n_positions, context_length)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts without the tokenizer's own special tokens; the BOS is prepended to those that lack it.

        Raises:
            TaskError: a token has no row in the model's embedding.
        """
        return [self._opening(ids) + ids for ids in self.encode_plain(texts)]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts without special tokens and without a BOS.

        Raises:
            TaskError: a token has no row in the model's embedding.
        """
        return self._checked(texts, self._plain(texts))

    def _checked(self, texts: Sequence[str], rows: list[list[int]]) -> list[list[int]]:
        """The ids of texts, if all of them have a row in the model's embedding."""
        for text, row in zip(texts, rows, strict=True):
            token = max(row, default=0)
            if token >= self.vocabulary_size:
                beginning = repr(text) if len(text) < 500 else f"{text[:100]!r}..."
                raise TaskError(
                    f"The token {self.tokenizer.convert_ids_to_tokens(token)!r} of the prompt {beginning} has the id "
                    f"{token}, but the model's vocabulary has {self.vocabulary_size} tokens: it was added to the "
                    "tokenizer and not to the model. Leave it out of the prompts, or resize the model's embedding."
                )
        return rows

    def encode_with_places(
        self, texts: Sequence[str], subject: str = "This", alternative: str = ""
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of texts as in `encode`, and for each id its first character in the text and the one after its last.

        Args:
            texts: the texts.
            subject: beginning of the message about a slow tokenizer.
            alternative: end of what it advises.

        Raises:
            TaskError: as in `encode`; or the tokenizer is slow, and does not tell which characters tokens cover.
        """
        if not self.tokenizer.is_fast:
            raise TaskError(
                f"{subject} tokenizer is a slow one ({type(self.tokenizer).__name__}), which does not tell which "
                "characters a token covers. Use the model's fast tokenizer (a folder with tokenizer.json)"
                f"{alternative}."
            )
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = zip(self._checked(texts, encoded["input_ids"]), encoded["offset_mapping"], strict=True)
        openings = ((self._opening(ids), ids, places) for ids, places in rows)
        return [(opening + ids, [(0, 0)] * len(opening) + places) for opening, ids, places in openings]

    def pad(
        self, rows: Sequence[Sequence[int]], side: PaddingSide
    ) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
        """The token ids of prompts, padded on one side into one tensor, and a mask that is True at real tokens.

        Raises:
            TaskError: a prompt has more tokens than the model has positions.
        """
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        width = int(lengths.max())
        if self.n_positions is not None and width > self.n_positions:
            opening = self.tokenizer.decode(max(map(list, rows), key=len)[:20])
            raise TaskError(
                f"A prompt has {width} tokens, but the model has {self.n_positions} positions and cannot run it: "
                f"{opening!r}...\nChoose shorter prompts, or a model with more positions."
            )
        columns = torch.arange(width)
        mask = columns < lengths if side == "right" else columns >= width - lengths
        tokens = torch.full(mask.shape, self.padding)
        tokens[mask] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long)
        return tokens, mask

    def protected(
        self, tokens: Int[Tensor, "batch position"], mask: Bool[Tensor, "batch position"]
    ) -> Bool[Tensor, "batch position"]:
        """True at tokens that are never ablated: a BOS that is the first token of its prompt."""
        return leading_tokens(tokens, (mask.long().cumsum(dim=1) - 1).clamp(min=0), self.bos) & mask

    def span_flags(self, texts: Sequence[str], spans: Sequence[Mapping[str, Span]]) -> list[dict[str, list[bool]]]:
        """A flag for every token of `encode`, for each text and each of its named spans.

        It is True at tokens that share a non-whitespace character with the span.

        Raises:
            TaskError: the tokenizer does not tell which characters a token covers; a span is not part of its text, or
                holds no token that may be ablated.
        """
        if not any(spans):
            return [{} for _ in texts]
        subject = f"The prompts name spans ({', '.join(next(filter(None, spans)))}), and this"
        encoded = self.encode_with_places(texts, subject, ", or prompts without spans")
        return [
            {name: self._flags(text, name, span, places) for name, span in named.items()}
            for text, named, (_, places) in zip(texts, spans, encoded, strict=True)
        ]

    def _flags(self, text: str, name: str, span: Span, places: Sequence[tuple[int, int]]) -> list[bool]:
        start, end = _characters(text, name, span)
        flags = [bool(text[max(start, first) : min(end, last)].strip()) for first, last in places]
        if not any(flags[self.bos is not None :]):
            state = "the beginning-of-sequence token, which is never ablated" if any(flags) else "part of no token"
            raise TaskError(
                f"The span {name!r} of the prompt {text!r} is {text[start:end]!r}, which is {state}. Let it cover a "
                "character of another token."
            )
        return flags

    def continuation(self, text: str, piece: str) -> int | None:
        """Id of the single token with which `piece` continues `text`.

        Only the last word of `text` can change how `piece` is tokenised, so the id is cached by that word.

        Args:
            text: the text before it.
            piece: the continuation, with its leading space if it has one (" Anna", "32").

        Returns:
            The id; None if `piece` is several tokens, changes the tokens before it, or is unknown.
        """
        last_word = text.rsplit(maxsplit=1)[-1] if text.strip() else ""
        # The cache key includes white space at the end: "is " is continued by "43", "is" by " 43".
        last_word += text[len(text.rstrip()) :]
        key = (last_word, piece)
        if key not in self._continuations:
            context = f"{CONTEXT} {last_word}" if last_word else CONTEXT
            before, after = self._plain([context, context + piece])
            follows = after[:-1] == before and len(after) == len(before) + 1 and after[-1] < self.vocabulary_size
            # A token for unknown words, declared as such or not, does not decode to the word.
            known = follows and str(self.tokenizer.decode(after[-1:])).strip() == piece.strip()
            self._continuations[key] = after[-1] if known else None
        return self._continuations[key]

    def is_single_token(self, word: str) -> bool:
        """True if a word after a space, in the middle of a sentence, is one token."""
        return self.continuation("", f" {word}") is not None

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # A text may be longer than the model's context; only prompts may not.
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _opening(self, ids: list[int]) -> list[int]:
        """The BOS, if there is one and the text does not begin with it."""
        return [] if self.bos is None or ids[:1] == [self.bos] else [self.bos]


def needs_space(text: str, word: str) -> bool:
    """True if a word can only follow a text with a space between them, as "Paris" follows "The capital is".

    No space belongs after white space or an opening character, before a closing one, inside a number, or in scripts
    without spaces.
    """
    if not text or not word or text[-1].isspace() or word[0].isspace():
        return False
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in (text[-1], word[0]))
    in_number = text[-1].isdigit() and word[0].isdigit()
    in_quotes = text[-1] == '"' and text.count('"') % 2 == 1
    return not (wide or in_number or in_quotes or text[-1] in OPENING or word[0] in CLOSING)


def _characters(text: str, name: str, span: Span) -> tuple[int, int]:
    """Index of a span's first character and of the one after its last."""
    if isinstance(span, str):
        places = [start for start in range(len(text)) if text.startswith(span, start)]
        if len(places) != 1:
            raise TaskError(
                f"The span {name!r} of the prompt {text!r} is {span!r}, which occurs {len(places)} times in it; "
                "expected once. Correct it, or give its first character and the one after its last as [start, end]."
            )
        return places[0], places[0] + len(span)
    start, end = span
    if not 0 <= start < end <= len(text):
        raise TaskError(
            f"The span {name!r} of the prompt {text!r} is [{start}, {end}]; expected 0 <= start < end <= {len(text)}, "
            "the first character and the one after the last."
        )
    return start, end
