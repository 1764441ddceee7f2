"""The sum of the last four digits modulo five, in a GPT-NeoX of 4 layers and 3 heads (297 edges).

After "3 1 4 4 0 2" the answer is "0". Attention and MLP of a layer read the same residual stream, so an MLP does not
see the output of the heads of its layer. Heads distinguish positions by rotary embeddings, with queries and keys that
are constants.
"""

import random

from oa_train.seeds import torch_generator
from oa_train.tasks import Prompt
from oa_train.zoo.known.families import gpt_neox
from oa_train.zoo.known.model import KnownModel, KnownTask
from oa_train.zoo.known.parts import add_distractors, add_table
from oa_train.zoo.known.wiring import Wiring, subspaces

DIGITS = tuple("01234")
SHORTEST, LONGEST = 5, 9
SUMMED = 4

EDGES = (
    "input->a0.h0<v>",
    "input->m1",
    "a0.h0->m1",
    "m1->a2.h0<v>",
    "m1->m3",
    "a2.h0->m3",
    "m3->logits",
)

ROLES = {
    "a0.h0": "copies the digit before",
    "m1": "adds it to the digit itself",
    "a2.h0": "copies the sum from two positions before",
    "m3": "adds the two sums",
    "a0.h1, m0": "each write a constant that m3 relies on",
    "a0.h2": "writes a sign, of which m2 takes the absolute value; m3 relies on that too",
    "a1.h0, a1.h1": "cancel each other",
    "a2.h1, a3.h0": "attend like a2.h0 and a0.h0, and write where nothing reads",
    "the others": "attend at random and write where nothing reads, as units of each MLP do",
}


class DigitSum(KnownTask):
    """Digits from 0 to 4; the answer is the sum of the last four modulo five.

    Distractors are the other digits. In the counterfactual the first of the four digits is different.
    """

    name = "digit_sum"
    words = DIGITS

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


def build_digit_sum(seed: int = 0) -> KnownModel:
    """Write the model; `seed` determines its distractors."""
    n = len(DIGITS)
    spaces = subspaces(72, token=n, before=n, pair=n, far=n, output=n)
    model = gpt_neox(72, DIGITS, rotated=1 / 3, base=123.0, n_layers=4, n_heads=3, n_units=40, n_positions=16)
    wiring = Wiring(model, spaces, DIGITS, DIGITS, torch_generator("known digit sum", seed))
    sums = {(first, second): (first + second) % n for first in range(n) for second in range(n)}
    wiring.copy(0, 0, "token", "before", back=1)
    add_table(wiring, 1, sums, ("token", "before"), "pair")
    wiring.copy(2, 0, "pair", "far", back=2)
    add_table(wiring, 3, sums, ("pair", "far"), "output", supported=True)
    # They do the same, and write where nothing reads.
    wiring.copy(2, 1, "pair", "rest", back=2)
    wiring.copy(3, 0, "token", "rest", back=1)
    add_distractors(
        wiring,
        constant_head=(0, 1),
        constant_unit=0,
        sign_head=(0, 2),
        absolute_units=2,
        cancelling_heads=((1, 0), (1, 1)),
    )
    return KnownModel(DigitSum, wiring.finish(), EDGES, ROLES)
