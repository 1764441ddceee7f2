"""Induction that does not mind case, in a GPT-2 of 3 layers and 4 heads (262 edges).

In "b F a C f" the last word is the second one again, in another case; the answer is what followed there, in lower
case: "a".
"""

import torch

from oa_train.seeds import torch_generator
from oa_train.zoo.known.decoding import add_decoder, add_letters
from oa_train.zoo.known.distractors import (
    add_absolute_units,
    add_cancelling_heads,
    add_constant_head,
    add_constant_unit,
    add_junk_head,
    add_junk_units,
    add_sign_head,
)
from oa_train.zoo.known.families import gpt2
from oa_train.zoo.known.model import KnownModel
from oa_train.zoo.known.subspaces import Subspaces
from oa_train.zoo.known.vocabulary import BOTH_CASES, LETTERS, embed_words, unembed_words
from oa_train.zoo.known.wiring import Wiring

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

WIRING = {
    "m0": "writes the letter of each word, whatever its case",
    "a1.h0": "copies the letter of the word before",
    "a2.h0": "attends to the word that stands behind the same letter, and copies it",
    "m2": "turns that word into its lower case",
    "a0.h0, m1": "each write a constant that m2 relies on",
    "a1.h1": "writes a sign, of which m1 takes the absolute value",
    "a1.h2, a1.h3": "cancel each other",
    "a0.h1, a2.h1": "attend like a1.h0 and a2.h0, and write where nothing reads",
    "the others": "attend at random and write where nothing reads, as units of each MLP do",
}


def build_case_induction(seed: int = 0) -> KnownModel:
    """Write the model.

    Args:
        seed: draws the parts that have no share in the task.
    """
    letters, words = len(LETTERS), BOTH_CASES
    spaces = Subspaces(
        104, token=len(words), position=N_POSITIONS, letter=letters, before=letters, answer=len(words), output=letters,
        one=1, coin=1, sign=1, support=1, balance=1,
    )  # fmt: skip
    wiring = Wiring(gpt2(spaces.width, words, n_layer=3, n_head=4, n_inner=48, n_positions=N_POSITIONS), spaces)
    generator = torch_generator("known case induction", seed)
    embed_words(wiring, words, generator)
    wiring.write_positions()
    unembed_words(wiring, words, LETTERS)
    _add_circuit(wiring)
    _add_distractors(wiring, generator)
    return KnownModel("case_induction", wiring.finish(), words, EDGES, WIRING)


def _add_circuit(wiring: Wiring) -> None:
    add_letters(wiring, 0)
    wiring.look_back(1, 0, 1)
    wiring.copy(1, 0, "letter", "before")
    wiring.match(2, 0, [("letter", "before")])
    wiring.copy(2, 0, "token", "answer")
    add_decoder(wiring, 2, n_outputs=len(LETTERS))


def _add_distractors(wiring: Wiring, generator: torch.Generator) -> None:
    add_constant_head(wiring, 0, 0)
    wiring.look_back(0, 1, 1)
    wiring.copy(0, 1, "token", "rest")
    add_sign_head(wiring, 1, 1)
    add_absolute_units(wiring, 1)
    add_constant_unit(wiring, 1)
    add_cancelling_heads(wiring, 1, (2, 3), generator)
    wiring.match(2, 1, [("letter", "before")])
    wiring.copy(2, 1, "token", "rest")
    for layer, head in ((0, 2), (0, 3), (2, 2), (2, 3)):
        add_junk_head(wiring, layer, head, generator)
    for layer in range(3):
        add_junk_units(wiring, layer, 8, generator)
