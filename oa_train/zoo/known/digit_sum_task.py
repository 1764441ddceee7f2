"""The sum of the last four digits modulo five: "3 1 4 4 0 2" -> "0"."""

import random
from typing import Any

from oa_train.tasks.task import Prompt, Task
from oa_train.tasks.vocabulary import require_single_tokens
from oa_train.zoo.known.vocabulary import DIGITS

SHORTEST, LONGEST = 5, 9
SUMMED = 4


class DigitSum(Task):
    """Digits from 0 to 4; the answer is the sum of the last four modulo five.

    Distractors are the other digits. In the counterfactual the first of the four is another one. A model that does
    this is written by hand (`zoo.known.digit_sum`).

    Args:
        **options: the options of every task (see `Task`).
    """

    name = "digit_sum"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        require_single_tokens(self.encoder, self.name, DIGITS)

    def draw(self, random: random.Random) -> Prompt:
        """Draw the digits."""
        digits = random.choices(DIGITS, k=random.randint(SHORTEST, LONGEST))
        answer = DIGITS[sum(map(int, digits[-SUMMED:])) % len(DIGITS)]
        other = random.choice([digit for digit in DIGITS if digit != digits[-SUMMED]])
        return Prompt(
            text=" ".join(digits),
            answers=(f" {answer}",),
            distractors=tuple(f" {digit}" for digit in DIGITS if digit != answer),
            counterfactual=" ".join([*digits[:-SUMMED], other, *digits[1 - SUMMED :]]),
        )
