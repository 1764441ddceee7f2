"""Tokens of a corpus, cut into windows that stay within one document, and assigned to streams."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import get_args

import numpy as np
import torch

from oa_train.errors import TaskError
from oa_train.seeds import derive_seed
from oa_train.shapes import Int, Tensor
from oa_train.tasks.documents import Document
from oa_train.tasks.encoding import PromptEncoder
from oa_train.tasks.record_streams import LEAST, TEST_SHARE, VALIDATION_SHARE
from oa_train.tasks.task import Stream, stream_of

# Characters given to the tokenizer at once: for more, the objects that it makes for each token would fill the memory.
CHARACTERS_AT_ONCE = 1_000_000

# From this many documents on, every document belongs to one stream; the smallest streams then get about 20 documents.
MANY_DOCUMENTS = 200


@dataclass(frozen=True)
class Section:
    """A document's range of a corpus's tokens.

    Attributes:
        place: location of the document, for messages.
        start: index of its first token.
        end: index of the token after its last.
        split: its stream, if the corpus names it.
        hashed: the stream that a hash of its text gives.
    """

    place: str
    start: int
    end: int
    split: Stream | None
    hashed: Stream

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass
class Corpus:
    """Documents as tokens, one after another.

    Args:
        encoder: encoder of the model's prompts.
        max_tokens: at most this many tokens of each part are kept; the rest is not read.

    Attributes:
        tokens: ids of all tokens, without BOS.
        sections: the documents.
        n_repeated: number of documents that repeat an earlier one, which are left out.
        n_empty: number of documents with nothing but white space.
        is_cut: True if a part had more than `max_tokens` tokens.
    """

    encoder: PromptEncoder
    max_tokens: int
    tokens: Int[Tensor, " token"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    sections: list[Section] = field(default_factory=list)
    n_repeated: int = 0
    n_empty: int = 0
    is_cut: bool = False

    def read(self, parts: Iterable[Iterator[Document]]) -> "Corpus":
        """Tokenise the documents of all parts.

        Raises:
            ArtefactError: a document cannot be read.
            TaskError: a token has no row in the model's embedding.
        """
        pieces: list[Tensor] = []
        end = 0
        seen: set[bytes] = set()
        for part in parts:
            limit = end + self.max_tokens
            distinct = self._distinct(part, seen)
            for documents in _batches(distinct):
                for document, ids in zip(
                    documents, self.encoder.encode_plain([document.text for document in documents]), strict=True
                ):
                    # A BOS with which the text itself begins is dropped, because every window gets one.
                    plain = ids[1:] if ids[:1] == [self.encoder.bos] else ids
                    kept = torch.tensor(plain[: limit - end], dtype=torch.int32)
                    self.is_cut |= len(kept) < len(plain)
                    if len(kept):
                        pieces.append(kept)
                        start, end = end, end + len(kept)
                        hashed = stream_of(document.text)
                        self.sections.append(Section(document.place, start, end, document.split, hashed))
                if end == limit:
                    self.is_cut |= next(distinct, None) is not None
                    break
        self.tokens = torch.cat(pieces) if pieces else self.tokens
        return self

    def _distinct(self, documents: Iterator[Document], seen: set[bytes]) -> Iterator[Document]:
        for document in documents:
            if not document.text.strip():
                self.n_empty += 1
                continue
            digest = blake2b(document.text.encode(), digest_size=16).digest()
            if digest in seen:
                self.n_repeated += 1
                continue
            seen.add(digest)
            yield document


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a corpus: token `starts + j + 1` is the answer at token `starts + j`, for j from 0 to `lengths - 1`.

    Attributes:
        corpus: the tokens.
        starts: index of each window's first token.
        lengths: number of tokens of each window, without BOS and without the last answer.
        sections: index of each window's document.
    """

    corpus: Corpus
    starts: Int[Tensor, " window"]
    lengths: Int[Tensor, " window"]
    sections: Int[Tensor, " window"]

    @classmethod
    def cut(cls, corpus: Corpus, longest: int, least: int) -> "Windows":
        """Cut every document into windows of `longest` tokens; the last of a document may have as few as `least`.

        Tokens are counted without BOS. The token after a window, its last answer, is the first token of the next.
        """
        starts, lengths, sections = [], [], []
        for number, section in enumerate(corpus.sections):
            for start in range(section.start, section.end - 1, longest):
                length = min(longest, section.end - 1 - start)
                if length >= least:
                    starts.append(start)
                    lengths.append(length)
                    sections.append(number)
        columns = (torch.tensor(column, dtype=torch.long) for column in (starts, lengths, sections))
        return cls(corpus, *columns)

    def __len__(self) -> int:
        return len(self.starts)

    def ids(self, number: int) -> list[int]:
        """Token ids of a window and its last answer."""
        start, length = int(self.starts[number]), int(self.lengths[number])
        ids: list[int] = self.corpus.tokens[start : start + length + 1].tolist()
        return ids

    def seed(self, number: int, *key: int | str) -> int:
        """Seed determined by a key and the window's tokens alone, not by its place in the corpus."""
        return derive_seed(*key, np.asarray(self.ids(number), dtype="<i4").tobytes().hex())

    def place(self, number: int) -> str:
        """Location of a window for messages: its document, and its range of tokens in the document."""
        section = self.corpus.sections[int(self.sections[number])]
        first = int(self.starts[number]) - section.start
        return ", ".join(filter(None, (section.place, f"tokens {first} to {first + int(self.lengths[number]) - 1}")))

    def deal(self, source: str, advice: str) -> dict[Stream, list[int]]:
        """The windows of each stream, in hash order, so that the first N are a fair sample.

        `source` and `advice`, the name of the corpus and how to get more windows, are for messages.

        Raises:
            TaskError: only some documents have a `split`, or a stream has too few windows.
        """
        parts = self._by_blocks() if self.are_blocks else self._by_document(source)
        sizes = {stream: len(parts.get(stream, ())) for stream in LEAST}
        if any(size < LEAST[stream] for stream, size in sizes.items()):
            shown = ", ".join(f"{size} for {stream}" for stream, size in sizes.items())
            least = ", ".join(map(str, LEAST.values()))
            raise TaskError(f"{source} gives too few windows: {shown}; expected at least {least}. {advice}")
        ordered = {
            stream: sorted(windows, key=lambda number: self.seed(number, "order")) for stream, windows in parts.items()
        }
        return {stream: ordered.get(stream) or ordered["train"] for stream in get_args(Stream)}

    @property
    def are_blocks(self) -> bool:
        """True if streams are blocks of consecutive windows, because there are too few documents."""
        return not self._is_split and self.n_documents < MANY_DOCUMENTS

    @property
    def n_documents(self) -> int:
        """Number of documents that have a window."""
        return len(self.sections.unique())

    @property
    def _is_split(self) -> bool:
        return any(section.split is not None for section in self.corpus.sections)

    def _by_document(self, source: str) -> dict[Stream, list[int]]:
        """Whole documents: by their `split` if they have one, else by the hash of their text."""
        sections = self.corpus.sections
        bare = [section for section in sections if section.split is None]
        if bare and self._is_split:
            n_named = len(sections) - len(bare)
            raise TaskError(
                f"{source}, {bare[0].place}: no `split`, and {n_named} of {len(sections)} documents have one."
            )
        parts: dict[Stream, list[int]] = defaultdict(list)
        for number, section in enumerate(self.sections.tolist()):
            parts[sections[section].split or sections[section].hashed].append(number)
        return parts

    def _by_blocks(self) -> dict[Stream, list[int]]:
        """Consecutive blocks of windows: train, then validation, then test."""
        n_test = max(2, round(TEST_SHARE * len(self)))
        n_validation = max(2, round(VALIDATION_SHARE * len(self)))
        borders = (max(0, len(self) - n_test - n_validation), max(0, len(self) - n_test))
        blocks = zip((0, *borders), (*borders, len(self)), strict=True)
        parts: dict[Stream, list[int]] = {}
        for stream, (first, end) in zip(LEAST, blocks, strict=True):
            # The last answer of a window is the first token of the next one, which here belongs to another stream.
            continues = 0 < end < len(self) and bool(self.sections[end - 1] == self.sections[end])
            parts[stream] = list(range(first, end - continues))
        return parts
