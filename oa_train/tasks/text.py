"""Text: windows of any corpus, scored on the tokens that follow."""

from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from oa_train.batches import Batch
from oa_train.checks import check_at_least
from oa_train.errors import ConfigurationError, TaskError
from oa_train.seeds import python_generator
from oa_train.tasks.corpus import Corpus, Windows
from oa_train.tasks.documents import DocumentReader, listed_documents
from oa_train.tasks.finite_task import FiniteTask
from oa_train.tasks.task import Prompt, Stream

Scored = Literal["last", "all"] | int


class Text(FiniteTask):
    """Windows of plain text, of rows with a text field, or of a dataset; the answers are the next tokens.

    A window is part of one document, preceded by the BOS token (see `lm.bos`). There are no distractors and no
    counterfactuals, so `logit_difference` is against all other tokens. Streams share no text: they come from a
    `split`, else from a hash of each document, else (fewer than 200 documents) they are blocks of the corpus, with
    train first and test last. `docs/data.md` has the rules.

    Args:
        path: plain text file, file of rows (.jsonl, .json, .csv, .tsv, .parquet), folder of such files, folder saved
            by `datasets`, or `hf://owner/name` on the Hub.
        documents: the texts themselves, in place of `path`.
        field: field of a row that holds its text.
        pattern: glob pattern of the files in a folder that are read.
        separator: text between the documents of a plain file, in which a backslash followed by n stands for a line
            break; without it a file is one document.
        subset: configuration of a Hub dataset.
        context_length: number of tokens of a window, BOS included.
        least_tokens: tokens of the shortest window at a document's end; half of `context_length` by default.
        scored: `last` position, `all` positions except that of the BOS, or a number of positions drawn at random.
        first_scored: first position, counted from 0, that may be drawn, so that a prediction has context; by default
            8, or the last position of a shorter window.
        max_tokens: at most this many tokens are read; for a dataset, from each split.
        evaluation_batch_size: windows per batch outside training; limits memory, not results.
        **options: the options of every task (see `Task`) except `answer_positions`.

    Attributes:
        windows: the windows of all streams.
        streams: indices of the windows of each stream.

    Raises:
        ConfigurationError: an option has a value that cannot work, or there is no such file.
        ArtefactError: a file cannot be read.
        TaskError: the text is too short.
    """

    name: ClassVar[str] = "text"
    solvable: ClassVar[bool] = False

    def __init__(
        self,
        *,
        path: str | None = None,
        documents: list[str] | None = None,
        field: str = "text",
        pattern: str = "**/*.txt",
        separator: str | None = None,
        subset: str | None = None,
        context_length: int = 128,
        least_tokens: int | None = None,
        scored: Scored = "last",
        first_scored: int | None = None,
        max_tokens: int = 5_000_000,
        evaluation_batch_size: int = 16,
        **options: Any,
    ) -> None:
        if (path is None) == (documents is None):
            raise ConfigurationError("Give data.path, a corpus, or data.documents, but not both.")
        if options.get("answer_positions", "last") != "last":
            raise ConfigurationError("answer_positions is not for Text: say data.scored all.")
        if separator == "":
            raise ConfigurationError("separator is empty; leave it out to read a file as one document.")
        super().__init__(evaluation_batch_size=evaluation_batch_size, **options)
        self.source = "data.documents" if path is None else path
        check_at_least(2, context_length=context_length, least_tokens=least_tokens)
        check_at_least(1, max_tokens=max_tokens)
        self.context_length = context_length
        self.least_tokens = max(2, context_length // 2) if least_tokens is None else least_tokens
        self.scored: Scored = scored
        self.first_scored: int = min(8, self.least_tokens - 1) if first_scored is None else first_scored
        self._check_lengths()
        corpus = Corpus(self.encoder, max_tokens)
        if path is None:
            corpus.read(listed_documents(documents or []))
        else:
            line_break = None if separator is None else separator.replace("\\n", "\n")
            corpus.read(DocumentReader(path, field, pattern, line_break, subset).read())
        self.windows = Windows.cut(corpus, context_length - self._n_before, self.least_tokens - self._n_before)
        self._refuse_short()
        self.streams: dict[Stream, list[int]] = self.windows.deal(
            self.source,
            f"Give more text, or a lower data.context_length than {context_length}, or a `split` of documents into "
            "train, validation and test.",
        )
        self.remarks += self._remarks()
        self.cap_sizes()

    @property
    def _n_before(self) -> int:
        """Number of tokens in front of a window's text: 1 with a BOS, else 0."""
        return int(self.encoder.bos is not None)

    def _check_lengths(self) -> None:
        most = self.encoder.context_length
        if most is not None and self.context_length > most:
            raise ConfigurationError(
                f"context_length is {self.context_length}, and the model has {most} positions; expected at most as "
                f"many. Choose {most}, or a model with more positions."
            )
        if self.least_tokens > self.context_length:
            raise ConfigurationError(
                f"least_tokens is {self.least_tokens}; expected at most {self.context_length}, the context_length."
            )
        if self.scored in ("last", "all"):
            return
        if not isinstance(self.scored, int) or isinstance(self.scored, bool) or self.scored < 1:
            raise ConfigurationError(
                f"scored is {self.scored!r}; expected last, all, or a number of positions of at least 1."
            )
        if not self._n_before <= self.first_scored < self.least_tokens:
            raise ConfigurationError(
                f"first_scored is {self.first_scored}; expected {self._n_before} to {self.least_tokens - 1}, a "
                "position of the shortest window (least_tokens)."
            )
        n_positions = self.context_length - self.first_scored
        if self.scored > n_positions:
            raise ConfigurationError(
                f"scored is {self.scored}, and a window of {self.context_length} tokens has {n_positions} positions "
                f"from first_scored {self.first_scored} on; expected at most {n_positions}, or all."
            )

    def _refuse_short(self) -> None:
        sections = self.windows.corpus.sections
        if not sections:
            raise TaskError(f"{self.source} is empty: no document of it has any text.")
        if not len(self.windows):
            longest = max(section.n_tokens for section in sections)
            subject = "its document has" if len(sections) == 1 else f"the longest of its {len(sections)} documents has"
            raise TaskError(
                f"{self.source} is shorter than the context: {subject} {longest} tokens, and the shortest window "
                f"takes {self.least_tokens} (least_tokens, BOS included) and the token after it. Lower "
                "data.context_length or data.least_tokens, or give longer documents."
            )

    def _remarks(self) -> list[str]:
        windows, corpus = self.windows, self.windows.corpus
        n_documents, n_tokens = len(corpus.sections), len(corpus.tokens)
        shown, longest = _documents(n_documents), f"{self.context_length:,}"
        remarks = [f"{len(windows):,} windows of at most {longest} tokens, from {shown} with {n_tokens:,} tokens."]
        n_short = n_documents - windows.n_documents
        n_used = sum(corpus.sections[number].n_tokens for number in windows.sections.unique().tolist())
        if n_short:
            remarks.append(
                f"{n_short} of {shown} are shorter than {self.least_tokens:,} tokens and left out "
                f"({n_tokens - n_used:,} tokens)."
            )
        # The last answer of a document is not part of a window.
        n_ends = n_used - windows.n_documents - int(windows.lengths.sum())
        if n_ends:
            remarks.append(
                f"{n_ends:,} tokens at the ends of documents are left out: fewer than {self.least_tokens:,} remained."
            )
        if corpus.n_repeated:
            remarks.append(f"{_documents(corpus.n_repeated)} left out: repetitions of earlier ones.")
        if corpus.n_empty:
            remarks.append(f"{_documents(corpus.n_empty)} left out: no text.")
        if corpus.is_cut:
            remarks.append(
                f"Only the first {corpus.max_tokens:,} tokens are read (max_tokens), of each split of a dataset."
            )
        if windows.are_blocks:
            remarks.append(
                f"Streams are blocks of the text, with train first and test last: there are too few documents "
                f"({windows.n_documents}) to share them out whole."
            )
        return remarks

    def window(self, stream: Stream, index: int) -> int:
        """Index of the window that is prompt `index` of a stream.

        Raises:
            TaskError: a stream that is not trained on has no prompt of this number.
        """
        return self.streams[stream][self.place_of(stream, index)]

    def place(self, stream: Stream, index: int) -> str:
        """Location in the corpus of prompt number `index` of a stream."""
        return self.windows.place(self.window(stream, index))

    def lengths(self, stream: Stream, n_prompts: int) -> list[int]:
        """Number of tokens, BOS included, of each of the first windows of a stream."""
        lengths: list[int] = (self.windows.lengths[self.streams[stream]][:n_prompts] + self._n_before).tolist()
        return lengths

    def prompt(self, stream: Stream, index: int) -> Prompt:
        """Prompt number `index` of a stream, decoded, with the answer at its last position.

        Its text need not encode to the same tokens; `batch_of` takes the tokens themselves.

        Raises:
            TaskError: a stream that is not trained on has no prompt of this number.
        """
        *ids, answer = self.windows.ids(self.window(stream, index))
        return Prompt(str(self.tokenizer.decode(ids)), (str(self.tokenizer.decode([answer])),))

    def batch_of(self, stream: Stream, numbers: range) -> Batch:
        """The windows of a stream with these numbers, at least one, as a batch.

        Raises:
            TaskError: a stream that is not trained on has no prompt of such a number.
        """
        chosen = [self.window(stream, number) for number in numbers]
        opening = [] if self.encoder.bos is None else [self.encoder.bos]
        rows = [opening + self.windows.ids(window) for window in chosen]
        tokens, mask = self.encoder.pad([row[:-1] for row in rows], self.padding_side)
        positions = [self._positions(window) for window in chosen]
        most = max(map(len, positions))
        # A window with fewer scored positions repeats its last one with weight 0.
        filled = [[*row, *[row[-1]] * (most - len(row))] for row in positions]
        answers = [[row[place + 1] for place in places] for row, places in zip(rows, filled, strict=True)]
        columns = torch.tensor(filled)
        if self.padding_side == "left":
            columns += (~mask).sum(dim=1, keepdim=True)
        return Batch(
            tokens=tokens,
            attention_mask=mask,
            scored=columns,
            weights=torch.tensor([[(i < len(row)) / len(row) for i in range(most)] for row in positions]),
            answers=torch.tensor(answers).unsqueeze(2),
            distractors=torch.zeros(len(chosen), most, 0, dtype=torch.long),
            counterfactual_tokens=None,
            example_ids=torch.tensor(list(numbers)),
            padded=not bool(mask.all()),
            protected=self.encoder.protected(tokens, mask),
        )

    def _positions(self, window: int) -> list[int]:
        """Scored positions of a window, from 0 at its first token, the BOS included."""
        n_tokens = self._n_before + int(self.windows.lengths[window])
        if self.scored == "last":
            return [n_tokens - 1]
        if self.scored == "all":
            return list(range(self._n_before, n_tokens))
        assert isinstance(self.scored, int)
        candidates = range(self.first_scored, n_tokens)
        draw = python_generator(self.windows.seed(window, self.seed, self.name, "scored"))
        return sorted(draw.sample(candidates, min(self.scored, len(candidates))))

    def save(self, path: str | Path, stream: Stream, n_prompts: int) -> int:
        """Refuse: windows are token ids, and their texts need not encode to the same ones.

        Raises:
            TaskError: always.
        """
        raise TaskError(
            "Windows of text cannot be saved as prompts, because their text need not encode to the same tokens. Keep "
            f"the text itself ({self.source}) with the options of the task, which give the same windows again."
        )

    def describe(self) -> dict[str, Any]:
        """Everything that determines the prompts: a hash of all windows with their streams, not the corpus's path."""
        return {
            **super().describe(),
            "windows": self._digest,
            "n_windows": len(self.windows),
            "context_length": self.context_length,
            "scored": self.scored,
            "first_scored": self.first_scored if isinstance(self.scored, int) else None,
        }

    @cached_property
    def _digest(self) -> str:
        digest = blake2b(digest_size=8)
        windows = self.windows
        for column in (windows.corpus.tokens, windows.starts, windows.lengths):
            digest.update(column.numpy().tobytes())
        for stream, numbers in self.streams.items():
            digest.update(f"{stream} {numbers}".encode())
        return digest.hexdigest()


def _documents(number: int) -> str:
    return f"{number:,} document{'s' * (number != 1)}"
