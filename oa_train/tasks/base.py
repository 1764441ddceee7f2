"""What a task is: prompts that are drawn without state, in streams that share no prompt."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from oa_train.batches import Batch
from oa_train.errors import ConfigurationError, TaskError
from oa_train.models.loading import BUILT_IN, LMSpec
from oa_train.seeds import derive_seed, python_generator
from oa_train.shapes import Int, Tensor
from oa_train.tasks.tokens import PaddingSide, PromptEncoder, Tokenizer, bos_token_id, load_tokenizer

Stream = Literal["train", "refit", "means", "validation", "test"]

# Which tenths of all texts belong to which stream. Neither a seed nor an option moves a text to another
# stream, so what one run trains on is never what another one tests on.
TENTHS: tuple[Stream, ...] = ("train",) * 5 + ("refit",) * 2 + ("means", "validation", "test")

# The smallest streams hold a tenth of the texts, so a grammar with many texts fails this often with a
# chance of 0.9 ** 1000.
ATTEMPTS = 1000


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        text: the prompt, up to and including the token that predicts the answer.
        answers: texts of which each is a right continuation by one token (" Anna", "32").
        distractors: wrong continuations of one token that the answers are compared with.
        counterfactual: the prompt with other content, as many tokens long; None when the task has none.
    """

    text: str
    answers: tuple[str, ...]
    distractors: tuple[str, ...] = ()
    counterfactual: str | None = None


def stream_of(text: str) -> Stream:
    """The only stream in which a prompt with this text may appear."""
    return TENTHS[derive_seed("stream", text) % len(TENTHS)]


class Task(ABC):
    """Prompts of one kind, for one model's tokenizer.

    A prompt depends on the seed, its stream and its number and on nothing that was drawn before it.

    Args:
        lm: the model whose tokenizer encodes the prompts; the built-in model by default.
        seed: other seeds give other prompts.
        batch_size: prompts in a training batch.
        batches_per_epoch: training batches between two validations.
        n_validation: prompts that validation uses.
        n_test: prompts that the final evaluation uses.
        n_means: prompts over which mean ablation averages.
        padding_side: where shorter prompts of a batch are filled up.

    Attributes:
        name: name of the task in configurations and artefacts.
        encoder: turns texts into token ids.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        ModelError: the tokenizer cannot be loaded.
        TaskError: the tokenizer splits the words that the task needs.
    """

    name: ClassVar[str]

    def __init__(
        self,
        *,
        lm: LMSpec = BUILT_IN,
        seed: int = 0,
        batch_size: int = 16,
        batches_per_epoch: int = 50,
        n_validation: int = 512,
        n_test: int = 2048,
        n_means: int = 2048,
        padding_side: PaddingSide = "right",
    ) -> None:
        check_choice("padding_side", padding_side, get_args(PaddingSide))
        self.batch_size = positive("batch_size", batch_size)
        self.batches_per_epoch = positive("batches_per_epoch", batches_per_epoch)
        # Two prompts are the fewest that have a standard error.
        self.n_validation = positive("n_validation", n_validation, least=2)
        self.n_test = positive("n_test", n_test, least=2)
        self.n_means = positive("n_means", n_means)
        self.padding_side: PaddingSide = padding_side
        self.seed = seed
        self.lm = lm
        tokenizer = load_tokenizer(self.lm)
        self.encoder = PromptEncoder(tokenizer, bos_token_id(self.lm, tokenizer))

    @abstractmethod
    def draw(self, random: random.Random) -> Prompt:
        """Draw a prompt of any stream.

        Args:
            random: the only source of chance that may be used.
        """

    def describe(self) -> dict[str, Any]:
        """Everything that decides which prompts are drawn, as plain values for the header of an artefact."""
        return {"name": self.name, "seed": self.seed}

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.encoder.tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that stands in front of every prompt; None when there is none."""
        return self.encoder.bos

    def prompt(self, stream: Stream, index: int) -> Prompt:
        """Prompt number `index` of a stream.

        Raises:
            TaskError: the task has so few different prompts that none belongs to this stream.
        """
        for attempt in range(ATTEMPTS):
            prompt = self.draw(python_generator(self.seed, self.name, stream, index, attempt))
            if stream_of(prompt.text) == stream:
                return prompt
        raise TaskError(
            f"None of {ATTEMPTS} prompts that the task {self.name} drew belongs to the stream {stream!r}. Streams "
            "share no prompt, so the task has too few different prompts; allow more words, names or templates."
        )

    def batch(self, stream: Stream, index: int, size: int | None = None) -> Batch:
        """Prompts `index * size` to `(index + 1) * size - 1` of a stream.

        Args:
            stream: which stream.
            index: number of the batch.
            size: prompts in the batch; `batch_size` when not given.

        Raises:
            TaskError: a prompt does not fit the tokenizer.
        """
        size = self.batch_size if size is None else positive("size", size)
        return self._collate(stream, range(index * size, (index + 1) * size))

    def batches(self, stream: Stream, n_prompts: int, size: int) -> Iterator[Batch]:
        """The first `n_prompts` prompts of a stream in batches of `size`; the last may be smaller."""
        for start in range(0, n_prompts, positive("size", size)):
            yield self._collate(stream, range(start, min(start + size, n_prompts)))

    def _collate(self, stream: Stream, numbers: range) -> Batch:
        prompts = [self.prompt(stream, number) for number in numbers]
        rows = self.encoder.encode([prompt.text for prompt in prompts])
        tokens, mask = self.encoder.pad(rows, self.padding_side)
        lengths = mask.sum(dim=1)
        width = tokens.shape[1]
        scored = lengths - 1 if self.padding_side == "right" else torch.full_like(lengths, width - 1)
        return Batch(
            tokens=tokens,
            attention_mask=mask,
            scored=scored,
            answers=self._continuations(prompts, [prompt.answers for prompt in prompts]),
            distractors=self._continuations(prompts, [prompt.distractors for prompt in prompts]),
            counterfactual_tokens=self._counterfactuals(prompts, rows),
            example_ids=torch.tensor(list(numbers)),
            padded=any(len(row) < width for row in rows),
        )

    def _continuations(
        self, prompts: Sequence[Prompt], pieces: Sequence[tuple[str, ...]]
    ) -> Int[Tensor, "batch piece"]:
        ids = torch.full((len(prompts), max(map(len, pieces))), -1, dtype=torch.long)
        for row, (prompt, texts) in enumerate(zip(prompts, pieces, strict=True)):
            for column, text in enumerate(texts):
                token = self.encoder.continuation(prompt.text, text)
                if token is None:
                    raise TaskError(
                        f"{text!r} after {prompt.text!r} is not one token of this tokenizer. The task {self.name} "
                        "scores one token, so leave this word out or choose a model whose tokenizer holds it."
                    )
                ids[row, column] = token
        return ids

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


def positive(name: str, value: int, least: int = 1) -> int:
    """Return `value` when it is at least `least`.

    Raises:
        ConfigurationError: it is not.
    """
    if value < least:
        raise ConfigurationError(f"{name} is {value}; expected a number of at least {least}.")
    return value


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of `choices`.

    Raises:
        ConfigurationError: it is not.
    """
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
