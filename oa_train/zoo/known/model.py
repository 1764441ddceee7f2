"""Base classes of the hand-written models and their tasks."""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from oa_train.models.frozen import CausalLM
from oa_train.tasks import GrammarTask
from oa_train.tasks.vocabulary import require_enough

LETTERS = tuple("abcdefgh")
BOTH_CASES = (*LETTERS, *(letter.upper() for letter in LETTERS))


class KnownTask(GrammarTask):
    """Base class of the tasks that hand-written models solve.

    Attributes:
        words: the vocabulary, in the order of its ids after the special tokens.

    Raises:
        TaskError: a word is not a single token of the tokenizer.
    """

    words: ClassVar[tuple[str, ...]]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        require_enough(
            [word for word in self.words if self.encoder.is_single_token(word)],
            self.words,
            task=self.name,
            what="words that it is made of are single tokens",
            minimum=len(self.words),
        )


def in_any_case(letter: str, random: random.Random) -> str:
    """A letter in lower or upper case, with equal probability."""
    return random.choice((letter, letter.upper()))


@dataclass(frozen=True, eq=False)
class KnownModel:
    """Model with hand-written weights, whose circuit is therefore known.

    Attributes:
        task: the task that it solves.
        model: the model, frozen and in float32.
        edges: the edges that solve the task, as `source->reader`; `zoo.truth` computes which of them are needed under
            a kind of ablation.
        roles: the function of each part of the model, in words.
    """

    task: type[KnownTask]
    model: CausalLM
    edges: tuple[str, ...]
    roles: dict[str, str]

    @property
    def name(self) -> str:
        """Name of the model and of its task."""
        return self.task.name
