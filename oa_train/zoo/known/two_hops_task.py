"""Looking up twice: "d F a C G f B c D b A d" -> "b"."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from oa_train.tasks.task import Prompt, Task
from oa_train.tasks.vocabulary import require_single_tokens
from oa_train.zoo.known.vocabulary import BOTH_CASES, LETTERS

FEWEST, MOST = 4, 5
MOST_FILLERS = 3


class TwoHops(Task):
    """Letters that stand for others: what does that stand for which the last one stands for?

    Each letter in lower case is followed, in upper case, by the one that it stands for; following them leads through
    all letters and back. Further letters in upper case stand in between, so that a position does not tell what stands
    there. Distractors are the other letters. In the counterfactual the same letters stand for others. A model that
    does this is written by hand (`zoo.known.two_hops`).

    Args:
        **options: the options of every task (see `Task`).
    """

    name = "two_hops"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        require_single_tokens(self.encoder, self.name, BOTH_CASES)

    def draw(self, random: random.Random) -> Prompt:
        """Draw the letters, what they stand for, and the last one."""
        letters = random.sample(LETTERS, random.randint(FEWEST, MOST))
        asked = random.choice(letters)
        meaning = _cycle(letters, random)
        answer = meaning[meaning[asked]]
        other = meaning
        while other[other[asked]] == answer:
            other = _cycle(letters, random)
        after = [random.choice(letters) for _ in range(random.randint(0, MOST_FILLERS))]
        fillers = {one: random.choices(LETTERS, k=after.count(one)) for one in letters}
        return Prompt(
            text=_text(letters, meaning, fillers, asked),
            answers=(f" {answer}",),
            distractors=tuple(f" {letter}" for letter in letters if letter != answer),
            counterfactual=_text(letters, other, fillers, asked),
        )


def _cycle(letters: Sequence[str], random: random.Random) -> dict[str, str]:
    """What each letter stands for."""
    order = random.sample(letters, len(letters))
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _text(letters: Sequence[str], meaning: Mapping[str, str], fillers: Mapping[str, Sequence[str]], asked: str) -> str:
    words = [word for one in letters for word in (one, *(other.upper() for other in (meaning[one], *fillers[one])))]
    return " ".join([*words, asked])
