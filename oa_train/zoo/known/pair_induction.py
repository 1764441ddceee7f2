"""Induction on two letters, in a Llama of 3 layers, 4 heads and 2 groups of keys and values (190 edges).

In "a B f A d H e b C A b" the last two letters repeat the first two, whatever their case; the answer is the letter
that followed them there, in lower case: "f". The letters that followed only one of them are wrong.
"""

import random

from oa_train.seeds import torch_generator
from oa_train.tasks import Prompt
from oa_train.zoo.known.families import llama
from oa_train.zoo.known.model import BOTH_CASES, LETTERS, KnownModel, KnownTask, in_any_case
from oa_train.zoo.known.parts import add_decoder, add_distractors, add_letters
from oa_train.zoo.known.wiring import Wiring, subspaces

MOST_FILLERS = 3

EDGES = (
    "input->m0",
    "m0->a1.k0<v>",
    "m0->a2.h0<q>",
    "a1.h0->a2.h0<q>",
    "a1.h0->a2.k0<k>",
    "a1.h1->a2.k0<k>",
    "input->a2.k0<v>",
    "a2.h0->m2",
    "m2->logits",
)

ROLES = {
    "m0": "writes the letter of each word, whatever its case",
    "a1.h0": "copies the letter of the word before",
    "a1.h1": "copies the letter of the word two before; it shares key and value with a1.h0",
    "a2.h0": "attends to the word that followed the same two letters before, and copies it",
    "m2": "turns that word into its lower case",
    "a0.h0, m1": "each write a constant that m2 relies on",
    "a0.h1": "writes a sign, of which m1 takes the absolute value; it shares key and value with a0.h0",
    "a1.h2, a1.h3": "cancel each other",
    "a2.h2": "attends like a2.h0, and writes where nothing reads",
    "the others": "attend at random and write where nothing reads, as units of each MLP do",
}


class PairInduction(KnownTask):
    """Triples of letters in any case, then the first two letters of one of them; the answer is its third letter.

    Each of the two letters also occurs with another letter; the letters that follow there are the distractors, so
    neither of the two gives the answer by itself. The answer is in lower case. The counterfactual has another letter
    in place of the first one where the two occurred together.
    """

    name = "pair_induction"
    words = BOTH_CASES

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


def build_pair_induction(seed: int = 0) -> KnownModel:
    """Write the model; `seed` determines its distractors."""
    n = len(LETTERS)
    spaces = subspaces(128, token=2 * n, letter=n, before=n, earlier=n, answer=2 * n, output=n)
    model = llama(128, BOTH_CASES, base=2e7, n_groups=2, n_layers=3, n_heads=4, n_units=48, n_positions=24)
    wiring = Wiring(model, spaces, BOTH_CASES, LETTERS, torch_generator("known pair induction", seed))
    add_letters(wiring, 0)
    wiring.copy(1, 0, "letter", "before", back=1)
    wiring.copy(1, 1, "letter", "earlier", back=2)
    wiring.copy(2, 0, "token", "answer", where=[("letter", "before"), ("before", "earlier")])
    add_decoder(wiring, 2)
    # It does the same, and writes where nothing reads.
    wiring.copy(2, 2, "token", "rest", where=[("letter", "before"), ("before", "earlier")])
    add_distractors(
        wiring,
        constant_head=(0, 0),
        constant_unit=1,
        sign_head=(0, 1),
        absolute_units=1,
        cancelling_heads=((1, 2), (1, 3)),
    )
    return KnownModel(PairInduction, wiring.finish(), EDGES, ROLES)
