"""Looking up twice, in a GPT-2 of 4 layers and 3 heads (309 edges).

In "d F a C f B c D d" every lower-case word is followed by what it stands for. The last word, "d", stands for "F", and
"f" for "B"; the answer is "b".
"""

import torch

from oa_train.seeds import torch_generator
from oa_train.zoo.known.decoding import add_decoder
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

WIRING = {
    "a0.h0": "copies the word before, if it is in lower case",
    "a1.h0": "attends to what stands behind the same lower-case word, and copies its letter",
    "a2.h0": "does so for the letter that a1.h0 has found",
    "m3": "turns the letter into a word in lower case",
    "a0.h1, m0": "each write a constant that m3 relies on",
    "a1.h1": "writes a sign, of which m2 takes the absolute value; m3 relies on that too",
    "a3.h0, a3.h1": "cancel each other",
    "a1.h2, a2.h2": "attend like a1.h0 and a0.h0, and write where nothing reads",
    "the others": "attend at random and write where nothing reads, as units of each MLP do",
}


def build_two_hops(seed: int = 0) -> KnownModel:
    """Write the model.

    Args:
        seed: draws the parts that have no share in the task.
    """
    n, words = len(LETTERS), BOTH_CASES
    spaces = Subspaces(
        96, lower=n, upper=n, position=N_POSITIONS, before=n, hop=n, answer=n, output=n,
        one=1, coin=1, sign=1, support=1, balance=1,
    )  # fmt: skip
    spaces.join("token", "lower", "upper")
    wiring = Wiring(gpt2(spaces.width, words, n_layer=4, n_head=3, n_inner=40, n_positions=N_POSITIONS), spaces)
    generator = torch_generator("known two hops", seed)
    embed_words(wiring, words, generator)
    wiring.write_positions()
    unembed_words(wiring, words, LETTERS)
    _add_circuit(wiring)
    _add_distractors(wiring, generator)
    return KnownModel("two_hops", wiring.finish(), words, EDGES, WIRING)


def _add_circuit(wiring: Wiring) -> None:
    wiring.look_back(0, 0, 1)
    wiring.copy(0, 0, "lower", "before")
    wiring.match(1, 0, [("lower", "before")])
    wiring.copy(1, 0, "upper", "hop")
    wiring.match(2, 0, [("hop", "before")])
    wiring.copy(2, 0, "upper", "answer")
    add_decoder(wiring, 3, n_outputs=len(LETTERS))


def _add_distractors(wiring: Wiring, generator: torch.Generator) -> None:
    add_constant_head(wiring, 0, 1)
    add_constant_unit(wiring, 0)
    add_sign_head(wiring, 1, 1)
    add_absolute_units(wiring, 2)
    wiring.match(1, 2, [("lower", "before")])
    wiring.copy(1, 2, "upper", "rest")
    wiring.look_back(2, 2, 1)
    wiring.copy(2, 2, "lower", "rest")
    add_cancelling_heads(wiring, 3, (0, 1), generator)
    for layer, head in ((0, 2), (2, 1), (3, 2)):
        add_junk_head(wiring, layer, head, generator)
    for layer in range(4):
        add_junk_units(wiring, layer, 8, generator)
