"""A lookup in two steps, in a GPT-2 of 4 layers and 3 heads (309 edges).

In "d F a C f B c D d" every letter in lower case is followed by the letter that it stands for. The last letter, "d",
stands for "F", and "f" for "B"; the answer is "b".
"""

import random
from collections.abc import Mapping, Sequence

from oa_train.seeds import torch_generator
from oa_train.tasks import Prompt
from oa_train.zoo.known.families import gpt2
from oa_train.zoo.known.model import BOTH_CASES, LETTERS, KnownModel, KnownTask
from oa_train.zoo.known.parts import add_decoder, add_distractors
from oa_train.zoo.known.wiring import Wiring, subspaces

FEWEST, MOST = 4, 5
MOST_FILLERS = 3
N_POSITIONS = 16

EDGES = (
    "input->a0.h0<q>",
    "input->a0.h0<k>",
    "input->a0.h0<v>",
    "input->a1.h0<q>",
    "a0.h0->a1.h0<k>",
    "input->a1.h0<v>",
    "a1.h0->a2.h0<q>",
    "a0.h0->a2.h0<k>",
    "input->a2.h0<v>",
    "a2.h0->m3",
    "m3->logits",
)

ROLES = {
    "a0.h0": "copies the word before, if it is in lower case",
    "a1.h0": "attends to the word that follows the same lower-case word, and copies its letter",
    "a2.h0": "does so for the letter that a1.h0 has found",
    "m3": "turns the letter into a word in lower case",
    "a0.h1, m0": "each write a constant that m3 relies on",
    "a1.h1": "writes a sign, of which m2 takes the absolute value; m3 relies on that too",
    "a3.h0, a3.h1": "cancel each other",
    "a1.h2, a2.h2": "attend like a1.h0 and a0.h0, and write where nothing reads",
    "the others": "attend at random and write where nothing reads, as units of each MLP do",
}


class TwoHops(KnownTask):
    """Letters that stand for other letters, then one of them again; the answer is the letter two steps from it.

    Each letter in lower case is followed, in upper case, by the letter that it stands for; following them leads
    through all letters and back. There are additional letters in upper case in between, so that a position does not
    determine its letter. Distractors are the other letters. In the counterfactual the same letters stand for others.
    """

    name = "two_hops"
    words = BOTH_CASES

    def draw(self, random: random.Random) -> Prompt:
        """Draw the letters, what they stand for, and the last one."""
        letters = random.sample(LETTERS, random.randint(FEWEST, MOST))
        query = random.choice(letters)
        meaning = _cycle(letters, random)
        answer = meaning[meaning[query]]
        other = meaning
        while other[other[query]] == answer:
            other = _cycle(letters, random)
        after = [random.choice(letters) for _ in range(random.randint(0, MOST_FILLERS))]
        fillers = {letter: random.choices(LETTERS, k=after.count(letter)) for letter in letters}
        return Prompt(
            text=_text(letters, meaning, fillers, query),
            answers=(f" {answer}",),
            distractors=tuple(f" {letter}" for letter in letters if letter != answer),
            counterfactual=_text(letters, other, fillers, query),
        )


def _cycle(letters: Sequence[str], random: random.Random) -> dict[str, str]:
    """The letter that each letter stands for."""
    order = random.sample(letters, len(letters))
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _text(letters: Sequence[str], meaning: Mapping[str, str], fillers: Mapping[str, Sequence[str]], query: str) -> str:
    words = []
    for letter in letters:
        words += [letter, meaning[letter].upper(), *(filler.upper() for filler in fillers[letter])]
    return " ".join([*words, query])


def build_two_hops(seed: int = 0) -> KnownModel:
    """Write the model; `seed` determines its distractors."""
    n = len(LETTERS)
    spaces = subspaces(96, lower=n, upper=n, position=N_POSITIONS, before=n, hop=n, answer=n, output=n)
    spaces["token"] = slice(spaces["lower"].start, spaces["upper"].stop)
    model = gpt2(96, BOTH_CASES, n_layers=4, n_heads=3, n_units=40, n_positions=N_POSITIONS)
    wiring = Wiring(model, spaces, BOTH_CASES, LETTERS, torch_generator("known two hops", seed))
    wiring.copy(0, 0, "lower", "before", back=1)
    wiring.copy(1, 0, "upper", "hop", where=[("lower", "before")])
    wiring.copy(2, 0, "upper", "answer", where=[("hop", "before")])
    add_decoder(wiring, 3)
    # They do the same, and write where nothing reads.
    wiring.copy(1, 2, "upper", "rest", where=[("lower", "before")])
    wiring.copy(2, 2, "lower", "rest", back=1)
    add_distractors(
        wiring,
        constant_head=(0, 1),
        constant_unit=0,
        sign_head=(1, 1),
        absolute_units=2,
        cancelling_heads=((3, 0), (3, 1)),
    )
    return KnownModel(TwoHops, wiring.finish(), EDGES, ROLES)
