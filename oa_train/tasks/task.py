"""Tasks: sources of prompts in streams, and the batches made from them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch

from oa_train.batches import Batch
from oa_train.checks import check_at_least, check_choice
from oa_train.errors import TaskError
from oa_train.files import replace_file
from oa_train.models.spec import BUILT_IN, LMSpec
from oa_train.seeds import derive_seed
from oa_train.shapes import Bool, Int, Tensor
from oa_train.tasks.encoding import PaddingSide, PromptEncoder, Span, Tokenizer, needs_space

Stream = Literal["train", "refit", "means", "validation", "test"]
AnswerPositions = Literal["last", "every"]

# Streams of the ten classes that texts are hashed into. Neither a seed nor an option moves a text to another stream,
# so no run is tested on a text that another run was trained on.
TENTHS: tuple[Stream, ...] = ("train",) * 5 + ("refit",) * 2 + ("means", "validation", "test")


@dataclass(frozen=True)
class Question:
    """A place inside a prompt at which an answer is expected.

    Attributes:
        text: the beginning of the prompt, up to and including the token that predicts the answer.
        answers: correct single-token continuations (" Anna", "32").
        distractors: wrong single-token continuations that the answers are compared with.
    """

    text: str
    answers: tuple[str, ...]
    distractors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt(Question):
    """A text that ends with a question and may contain earlier ones.

    Attributes:
        text: the prompt, up to and including the token that predicts the last answer.
        answers: correct continuations of the whole text.
        distractors: wrong continuations of the whole text.
        counterfactual: a prompt with other content and the same number of tokens; None if the task has none.
        earlier: questions that the text itself goes on to answer, from left to right.
        spans: named parts of the text: index of the first character of each and of the one after its last, or a
            substring that occurs exactly once.
    """

    counterfactual: str | None = None
    earlier: tuple[Question, ...] = ()
    spans: Mapping[str, Span] = field(default_factory=dict, hash=False)

    def to_row(self) -> dict[str, Any]:
        """The prompt in the fields that `Records` reads."""
        questions = [_row_of(question) for question in (self, *self.earlier)]
        row = questions[0] | {"counterfactual": self.counterfactual, "earlier": questions[1:]}
        row["spans"] = {name: list(span) if isinstance(span, tuple) else span for name, span in self.spans.items()}
        # Where `Records` would put a space.
        words = (*self.answers, *self.distractors)
        row["as_written"] = self.text.endswith(" ") or any(needs_space(self.text, word) for word in words)
        return {name: value for name, value in row.items() if value}


def _row_of(question: Question) -> dict[str, Any]:
    row = {"prompt": question.text, "answers": list(question.answers)}
    return row | ({"wrong_answers": list(question.distractors)} if question.distractors else {})


def stream_of(text: str) -> Stream:
    """The only stream in which a prompt with this text may occur."""
    return TENTHS[derive_seed("stream", text) % len(TENTHS)]


class Task(ABC):
    """Source of prompts of one kind, encoded for one model.

    Args:
        lm: the model whose tokenizer encodes the prompts; the built-in model by default.
        seed: other seeds give other prompts, if prompts are drawn.
        batch_size: number of prompts in a training batch.
        batches_per_epoch: number of training batches between two validations.
        n_validation: number of prompts in a validation.
        n_test: number of prompts in the final evaluation.
        n_means: number of prompts over which mean ablation averages.
        padding_side: side on which shorter prompts of a batch are padded.
        evaluation_batch_size: prompts per batch when the model is only evaluated; limits memory, not results.
        answer_positions: `last` scores each prompt's last answer, `every` the earlier ones as well.

    Attributes:
        name: name of the task in configurations and artefacts.
        solvable: True if a capable model answers nearly every prompt; users are warned of one that does not.
        encoder: turns texts into token ids.
        remarks: sentences to read before trusting results: what was left out or added, or is scarce.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        ModelError: the tokenizer cannot be loaded, or does not fit the model's embedding.
        TaskError: the tokenizer splits the words that the task needs.
    """

    name: ClassVar[str]
    solvable: ClassVar[bool] = True

    def __init__(
        self,
        *,
        lm: LMSpec = BUILT_IN,
        seed: int = 0,
        batch_size: int = 16,
        batches_per_epoch: int = 50,
        n_validation: int = 128,
        n_test: int = 512,
        n_means: int = 512,
        padding_side: PaddingSide = "right",
        evaluation_batch_size: int = 128,
        answer_positions: AnswerPositions = "last",
    ) -> None:
        check_choice("padding_side", padding_side, get_args(PaddingSide))
        check_choice("answer_positions", answer_positions, get_args(AnswerPositions))
        check_at_least(1, evaluation_batch_size=evaluation_batch_size, batch_size=batch_size, n_means=n_means)
        check_at_least(1, batches_per_epoch=batches_per_epoch)
        # A standard error takes two prompts.
        check_at_least(2, n_validation=n_validation, n_test=n_test)
        self.evaluation_batch_size = evaluation_batch_size
        self.answer_positions: AnswerPositions = answer_positions
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.n_validation = n_validation
        self.n_test = n_test
        self.n_means = n_means
        self.padding_side: PaddingSide = padding_side
        self.seed = seed
        self.lm = lm
        self.encoder = PromptEncoder.of(lm)
        self.remarks: list[str] = []
        self._span_names: tuple[str, ...] | None = None

    @abstractmethod
    def prompt(self, stream: Stream, index: int) -> Prompt:
        """Prompt number `index` of a stream, which does not depend on prompts made before.

        Streams should share no text: `stream_of` tells which one a text belongs to.

        Raises:
            TaskError: the stream has no prompts.
        """

    def describe(self) -> dict[str, Any]:
        """Everything that determines the prompts, as plain values for the header of an artefact."""
        return {
            "name": self.name,
            "seed": self.seed,
            "answer_positions": self.answer_positions,
            "bos_token_id": self.encoder.bos,
        }

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.encoder.tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token in front of every prompt; None if there is none."""
        return self.encoder.bos

    def size(self, stream: Stream) -> int | None:
        """Number of prompts of a stream; None if prompts are drawn without end."""
        return None

    def place(self, stream: Stream, index: int) -> str:
        """Place of prompt number `index` of a stream in its file; empty for prompts that are drawn."""
        return ""

    def lengths(self, stream: Stream, n_prompts: int) -> list[int]:
        """Number of tokens, BOS included, of each distinct text among the first prompts of a stream."""
        texts = {self.prompt(stream, number).text for number in range(n_prompts)}
        return [len(ids) for ids in self.encoder.encode(sorted(texts))]

    def left_out_report(self) -> str:
        """Lines that say what was left out of the task's file, and why; empty if nothing was."""
        return ""

    def save(self, path: str | Path, stream: Stream, n_prompts: int) -> int:
        """Write the first prompts of a stream to a JSON Lines file, which `Records` reads.

        Repeated texts are written once.

        Args:
            path: the file; an existing one is replaced.
            stream: stream of the prompts, in this task and in the file.
            n_prompts: number of prompts that are read; fewer if the stream has fewer.

        Returns:
            The number of prompts that were written.

        Raises:
            TaskError: as in `prompt`.
        """
        size = self.size(stream)
        numbers = range(n_prompts if size is None else min(n_prompts, size))
        prompts = {prompt.text: prompt for prompt in (self.prompt(stream, number) for number in numbers)}
        lines = [json.dumps({**prompt.to_row(), "split": stream}, ensure_ascii=False) for prompt in prompts.values()]
        replace_file(Path(path), "".join(f"{line}\n" for line in lines).encode())
        return len(prompts)

    def batch(self, stream: Stream, index: int, size: int | None = None) -> Batch:
        """Prompts `index * size` to `(index + 1) * size - 1` of a stream; `size` is `batch_size` by default.

        Raises:
            TaskError: as in `batch_of`.
        """
        check_at_least(1, size=size)
        size = self.batch_size if size is None else size
        return self.batch_of(stream, range(index * size, (index + 1) * size))

    def batches(self, stream: Stream, n_prompts: int, size: int | None = None) -> Iterator[Batch]:
        """The first `n_prompts` prompts of a stream, in batches of at most `size`, `evaluation_batch_size` by default.

        Raises:
            TaskError: as in `batch_of`.
        """
        check_at_least(1, size=size)
        size = self.evaluation_batch_size if size is None else size
        for start in range(0, n_prompts, size):
            yield self.batch_of(stream, range(start, min(start + size, n_prompts)))

    def batch_of(self, stream: Stream, numbers: range) -> Batch:
        """The prompts of a stream with these numbers, at least one, as a batch.

        Raises:
            TaskError: a prompt does not fit the tokenizer or model, or its spans are wrong or differ from the others'.
        """
        prompts = [self.prompt(stream, number) for number in numbers]
        rows = self.encoder.encode([prompt.text for prompt in prompts])
        tokens, mask = self.encoder.pad(rows, self.padding_side)
        width = tokens.shape[1]
        questions = [self._questions(prompt) for prompt in prompts]
        most = max(map(len, questions))
        # A prompt with fewer questions repeats its last one with weight 0.
        filled = [[*row, *[row[-1]] * (most - len(row))] for row in questions]
        return Batch(
            tokens=tokens,
            attention_mask=mask,
            scored=torch.tensor([self._columns(*pair, width) for pair in zip(filled, rows, strict=True)]),
            weights=torch.tensor([[(i < len(row)) / len(row) for i in range(most)] for row in questions]),
            answers=self._continuations(filled, lambda question: question.answers),
            distractors=self._continuations(filled, lambda question: question.distractors),
            counterfactual_tokens=self._counterfactuals(prompts, rows),
            example_ids=torch.tensor(list(numbers)),
            padded=any(len(row) < width for row in rows),
            protected=self.encoder.protected(tokens, mask),
            spans=self._spans(prompts, mask),
        )

    def _spans(
        self, prompts: Sequence[Prompt], mask: Bool[Tensor, "batch position"]
    ) -> dict[str, Bool[Tensor, "batch position"]]:
        if self._span_names is None:
            self._span_names = tuple(prompts[0].spans)
        names = self._span_names
        for prompt in prompts:
            if prompt.spans.keys() != set(names):
                lacking = sorted(set(names) - prompt.spans.keys())
                problem = f"lacks the spans {', '.join(lacking)}" if lacking else "names further spans"
                raise TaskError(
                    f"The prompt {prompt.text!r} {problem}: it names {', '.join(prompt.spans) or 'none'}, and other "
                    f"prompts of the task {self.name} name {', '.join(names) or 'none'}. Let all name the same ones."
                )
        flags = self.encoder.span_flags([prompt.text for prompt in prompts], [prompt.spans for prompt in prompts])
        spans = {name: torch.zeros_like(mask) for name in names}
        for name, inside in spans.items():
            inside[mask] = torch.tensor([flag for row in flags for flag in row[name]])
        return spans

    def _questions(self, prompt: Prompt) -> list[Question]:
        return [*prompt.earlier, prompt] if self.answer_positions == "every" else [prompt]

    def _columns(self, questions: Sequence[Question], row: list[int], width: int) -> list[int]:
        """Columns of the last token of each question in a padded row."""
        padding = width - len(row) if self.padding_side == "left" else 0
        *earlier, last = questions
        columns = []
        for question in earlier:
            begins = row if question is last else self.encoder.encode([question.text])[0]
            if row[: len(begins)] != begins:
                raise TaskError(
                    f"The tokens of {question.text!r} are not those with which {last.text!r} begins, so the position "
                    "that answers it cannot be determined. End the question at the end of a word."
                )
            columns.append(padding + len(begins) - 1)
        return [*columns, padding + len(row) - 1]

    def _continuations(
        self, questions: Sequence[Sequence[Question]], pieces: Callable[[Question], tuple[str, ...]]
    ) -> Int[Tensor, "batch scored piece"]:
        most = max(len(pieces(question)) for row in questions for question in row)
        ids = [[self._tokens(question, pieces(question), most) for question in row] for row in questions]
        return torch.tensor(ids, dtype=torch.long).view(len(questions), len(questions[0]), most)

    def _tokens(self, question: Question, pieces: Sequence[str], most: int) -> list[int]:
        """The token of each piece, padded with -1."""
        tokens = []
        for piece in pieces:
            token = self.encoder.continuation(question.text, piece)
            if token is None:
                raise TaskError(
                    f"{piece!r} after {question.text!r} is not one token of this tokenizer. The task {self.name} "
                    "scores one token, so leave this word out or choose a model whose tokenizer has it."
                )
            tokens.append(token)
        return tokens + [-1] * (most - len(tokens))

    def _counterfactuals(
        self, prompts: Sequence[Prompt], rows: Sequence[list[int]]
    ) -> Int[Tensor, "batch position"] | None:
        texts = [prompt.counterfactual for prompt in prompts if prompt.counterfactual is not None]
        if len(texts) < len(prompts):
            return None
        others = self.encoder.encode(texts)
        for prompt, row, other in zip(prompts, rows, others, strict=True):
            if len(row) != len(other):
                raise TaskError(
                    f"The counterfactual {prompt.counterfactual!r} has {len(other)} tokens and its prompt "
                    f"{prompt.text!r} has {len(row)}. They must be parallel token by token, because activations "
                    "of one replace those of the other."
                )
        return self.encoder.pad(others, self.padding_side)[0]
