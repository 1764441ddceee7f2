"""Induction that ignores case, in a GPT-2 of 3 layers and 4 heads (262 edges): "b F a C f" -> "a"."""

import random

from oa_train.seeds import torch_generator
from oa_train.tasks import Prompt
from oa_train.tasks.grammar import end_span, word_span
from oa_train.zoo.known.families import gpt2
from oa_train.zoo.known.model import BOTH_CASES, LETTERS, KnownModel, KnownTask, in_any_case
from oa_train.zoo.known.parts import add_decoder, add_distractors, add_letters
from oa_train.zoo.known.wiring import Wiring, subspaces

SHORTEST, LONGEST = 4, 7
N_POSITIONS = 16

EDGES = (
    "input->m0",
    "input->a1.h0<q>",
    "input->a1.h0<k>",
    "m0->a1.h0<v>",
    "m0->a2.h0<q>",
    "a1.h0->a2.h0<k>",
    "input->a2.h0<v>",
    "a2.h0->m2",
    "m2->logits",
)

ROLES = {
    "m0": "writes the letter of each word, whatever its case",
    "a1.h0": "copies the letter of the word before",
    "a2.h0": "attends to the word that followed the same letter before, and copies it",
    "m2": "turns that word into its lower case",
    "a0.h0, m1": "each write a constant that m2 relies on",
    "a1.h1": "writes a sign, of which m1 takes the absolute value",
    "a1.h2, a1.h3": "cancel each other",
    "a0.h1, a2.h1": "attend like a1.h0 and a2.h0, and write where nothing reads",
    "the others": "attend at random and write where nothing reads, as units of each MLP do",
}


class CaseInduction(KnownTask):
    """A row of different letters in any case, then one of them again; the answer is the letter that followed it.

    The answer is in lower case; distractors are the other letters of the row. The counterfactual has another letter at
    the first occurrence of the repeated one. Spans: `first` (that occurrence), `after` (the letter that follows it),
    `end` (the last token).
    """

    name = "case_induction"
    words = BOTH_CASES

    def draw(self, random: random.Random) -> Prompt:
        """Draw the row and the letter that is repeated."""
        length = random.randint(SHORTEST, LONGEST)
        *letters, another = random.sample(LETTERS, length + 1)
        row = [in_any_case(letter, random) for letter in letters]
        place = random.randrange(length - 1)
        again = in_any_case(letters[place], random)
        answer = letters[place + 1]
        text = " ".join([*row, again])
        return Prompt(
            text=text,
            answers=(f" {answer}",),
            distractors=tuple(f" {letter}" for letter in letters if letter not in (answer, letters[place])),
            counterfactual=" ".join([*row[:place], in_any_case(another, random), *row[place + 1 :], again]),
            spans={"first": word_span(row, place), "after": word_span(row, place + 1), "end": end_span(text)},
        )


def build_case_induction(seed: int = 0) -> KnownModel:
    """Write the model; `seed` determines its distractors."""
    n = len(LETTERS)
    spaces = subspaces(104, token=2 * n, position=N_POSITIONS, letter=n, before=n, answer=2 * n, output=n)
    model = gpt2(104, BOTH_CASES, n_layers=3, n_heads=4, n_units=48, n_positions=N_POSITIONS)
    wiring = Wiring(model, spaces, BOTH_CASES, LETTERS, torch_generator("known case induction", seed))
    add_letters(wiring, 0)
    wiring.copy(1, 0, "letter", "before", back=1)
    wiring.copy(2, 0, "token", "answer", where=[("letter", "before")])
    add_decoder(wiring, 2)
    # They do the same, and write where nothing reads.
    wiring.copy(0, 1, "token", "rest", back=1)
    wiring.copy(2, 1, "token", "rest", where=[("letter", "before")])
    add_distractors(
        wiring,
        constant_head=(0, 0),
        constant_unit=1,
        sign_head=(1, 1),
        absolute_units=1,
        cancelling_heads=((1, 2), (1, 3)),
    )
    return KnownModel(CaseInduction, wiring.finish(), EDGES, ROLES)
