"""Tasks whose prompts are drawn by a grammar."""

import random
from abc import abstractmethod
from collections.abc import Sequence
from string import Formatter
from typing import Any

from oa_train.checks import check_at_least
from oa_train.errors import TaskError
from oa_train.seeds import python_generator
from oa_train.tasks.task import Prompt, Stream, Task, stream_of

# The smallest streams hold a tenth of the texts, so all attempts of a grammar with many texts fail with a probability
# of 0.9 ** 1000.
ATTEMPTS = 1000

# Factor on the attempts if only one length will do: a length that one prompt in fifty has is missed with a probability
# of 0.998 ** 20000.
RARE_LENGTHS = 20


class GrammarTask(Task):
    """Task whose prompts are drawn at random, each by a generator seeded with the seed, the stream and its number.

    Args:
        n_tokens: only prompts of this many tokens, including a prepended BOS; by default prompts of any length.
        **options: the options of every task (see `Task`).
    """

    def __init__(self, *, n_tokens: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        check_at_least(1, n_tokens=n_tokens)
        self.n_tokens = n_tokens

    @abstractmethod
    def draw(self, random: random.Random) -> Prompt:
        """Draw a prompt of any stream; `random` is the only source of randomness that may be used."""

    def describe(self) -> dict[str, Any]:
        """Everything that determines the prompts, as plain values for the header of an artefact."""
        return {**super().describe(), "n_tokens": self.n_tokens}

    def prompt(self, stream: Stream, index: int) -> Prompt:
        """Draw prompt number `index` of a stream.

        Raises:
            TaskError: the task has so few different prompts that none is in this stream, or none has `n_tokens`.
        """
        lengths = set()
        for attempt in range(ATTEMPTS if self.n_tokens is None else ATTEMPTS * RARE_LENGTHS):
            prompt = self.draw(python_generator(self.seed, self.name, stream, index, attempt))
            if stream_of(prompt.text) != stream:
                continue
            if self.n_tokens is None:
                return prompt
            lengths.add(len(self.encoder.encode([prompt.text])[0]))
            if self.n_tokens in lengths:
                return prompt
        if lengths:
            raise TaskError(
                f"n_tokens is {self.n_tokens}, and no prompt that the task {self.name} drew has so many; their "
                f"lengths are {', '.join(map(str, sorted(lengths)))}."
            )
        raise TaskError(
            f"None of {ATTEMPTS} prompts that the task {self.name} drew belongs to the stream {stream!r}. Streams "
            "share no prompt, so the task has too few different prompts; allow more words, names or templates."
        )


def fill(template: str, **words: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """Fill a template; returns the text, and the character range [start, end) of the first use of each slot."""
    text = ""
    places: dict[str, tuple[int, int]] = {}
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot:
            places.setdefault(slot, (len(text), len(text) + len(words[slot])))
            text += words[slot]
    return text, places


def word_span(words: Sequence[str], number: int) -> tuple[int, int]:
    """Character range [start, end) of word `number` in a text of space-separated words."""
    end = len(" ".join(words[: number + 1]))
    return end - len(words[number]), end


def end_span(text: str) -> tuple[int, int]:
    """Character range of a text's last character, which gives the span of its last token."""
    return len(text) - 1, len(text)
