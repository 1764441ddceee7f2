"""Induction that does not mind case: "b F a C f" -> "a"."""

import random
from typing import Any

from oa_train.tasks.task import Prompt, Task
from oa_train.tasks.vocabulary import require_single_tokens
from oa_train.zoo.known.vocabulary import BOTH_CASES, LETTERS

SHORTEST, LONGEST = 4, 7


def in_any_case(letter: str, random: random.Random) -> str:
    """A letter, as likely in upper case as in lower."""
    return random.choice((letter, letter.upper()))


class CaseInduction(Task):
    """A row of different letters in any case, then one of them again; what follows is what followed it before.

    The answer is in lower case; distractors are the other letters of the row. The counterfactual has another letter
    where the one that comes back stood first. A model that does this is written by hand
    (`zoo.known.case_induction`).

    Args:
        **options: the options of every task (see `Task`).
    """

    name = "case_induction"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        require_single_tokens(self.encoder, self.name, BOTH_CASES)

    def draw(self, random: random.Random) -> Prompt:
        """Draw the row and which letter comes back."""
        length = random.randint(SHORTEST, LONGEST)
        *letters, another = random.sample(LETTERS, length + 1)
        row = [in_any_case(letter, random) for letter in letters]
        place = random.randrange(length - 1)
        again = in_any_case(letters[place], random)
        answer = letters[place + 1]
        return Prompt(
            text=" ".join([*row, again]),
            answers=(f" {answer}",),
            distractors=tuple(f" {letter}" for letter in letters if letter not in (answer, letters[place])),
            counterfactual=" ".join([*row[:place], in_any_case(another, random), *row[place + 1 :], again]),
        )
