"""Induction after two words: "a B f A d H e b C A b" -> "f"."""

import random
from typing import Any

from oa_train.tasks.task import Prompt, Task
from oa_train.tasks.vocabulary import require_single_tokens
from oa_train.zoo.known.case_induction_task import in_any_case
from oa_train.zoo.known.vocabulary import BOTH_CASES, LETTERS

MOST_FILLERS = 3


class PairInduction(Task):
    """Three letters each time, in any case: what followed the two letters that come back at the end?

    Each of the two stands with another letter as well; what follows there are the distractors, so that neither of the
    two tells the answer by itself. The answer is in lower case. The counterfactual has another letter in place of the
    first one where the two stood together. A model that does this is written by hand (`zoo.known.pair_induction`).

    Args:
        **options: the options of every task (see `Task`).
    """

    name = "pair_induction"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        require_single_tokens(self.encoder, self.name, BOTH_CASES)

    def draw(self, random: random.Random) -> Prompt:
        """Draw the letters, their order and their cases."""
        first, second, other_first, other_second, answer, *wrong, spare = random.sample(LETTERS, 8)
        triples = [[first, second, answer], [first, other_second, wrong[0]], [other_first, second, wrong[1]]]
        order = random.sample(range(3), 3)
        fillers = [spare] * random.randint(0, MOST_FILLERS)
        letters = [*fillers, *(letter for number in order for letter in triples[number]), first, second]
        words = [in_any_case(letter, random) for letter in letters]
        place = len(fillers) + 3 * order.index(0)
        return Prompt(
            text=" ".join(words),
            answers=(f" {answer}",),
            distractors=tuple(f" {letter}" for letter in wrong),
            counterfactual=" ".join([*words[:place], in_any_case(spare, random), *words[place + 1 :]]),
        )
