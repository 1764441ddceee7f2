"""Induction after two words, in a Llama of 3 layers, 4 heads and 2 groups of keys and values (190 edges).

In "a B f A d H e b C A b" the last two words are the first two again, whatever their case; the answer is what followed
them there, in lower case: "f". What followed one of them alone is wrong.
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
from oa_train.zoo.known.families import llama
from oa_train.zoo.known.model import KnownModel
from oa_train.zoo.known.subspaces import Subspaces
from oa_train.zoo.known.vocabulary import BOTH_CASES, LETTERS, embed_words, unembed_words
from oa_train.zoo.known.wiring import Wiring

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

WIRING = {
    "m0": "writes the letter of each word, whatever its case",
    "a1.h0": "copies the letter of the word before",
    "a1.h1": "copies the letter of the word two before; it shares key and value with a1.h0",
    "a2.h0": "attends to the word that stands behind the same two letters, and copies it",
    "m2": "turns that word into its lower case",
    "a0.h0, m1": "each write a constant that m2 relies on",
    "a0.h1": "writes a sign, of which m1 takes the absolute value; it shares key and value with a0.h0",
    "a1.h2, a1.h3": "cancel each other",
    "a2.h2": "attends like a2.h0, and writes where nothing reads",
    "the others": "attend at random and write where nothing reads, as units of each MLP do",
}


def build_pair_induction(seed: int = 0) -> KnownModel:
    """Write the model.

    Args:
        seed: draws the parts that have no share in the task.
    """
    n, words = len(LETTERS), BOTH_CASES
    spaces = Subspaces(
        128, token=2 * n, letter=n, before=n, earlier=n, answer=2 * n, output=n,
        one=1, coin=1, sign=1, support=1, balance=1,
    )  # fmt: skip
    sizes = {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
    }
    wiring = Wiring(llama(spaces.width, words, base=2e7, **sizes), spaces)
    generator = torch_generator("known pair induction", seed)
    embed_words(wiring, words, generator)
    unembed_words(wiring, words, LETTERS)
    _add_circuit(wiring)
    _add_distractors(wiring, generator)
    return KnownModel("pair_induction", wiring.finish(), words, EDGES, WIRING)


def _add_circuit(wiring: Wiring) -> None:
    add_letters(wiring, 0)
    wiring.look_back(1, 0, 1)
    wiring.copy(1, 0, "letter", "before")
    wiring.look_back(1, 1, 2)
    wiring.copy(1, 1, "letter", "earlier")
    wiring.match(2, 0, [("letter", "before"), ("before", "earlier")])
    wiring.copy(2, 0, "token", "answer")
    add_decoder(wiring, 2, n_outputs=len(LETTERS))


def _add_distractors(wiring: Wiring, generator: torch.Generator) -> None:
    add_constant_head(wiring, 0, 0)
    add_sign_head(wiring, 0, 1)
    add_absolute_units(wiring, 1)
    add_constant_unit(wiring, 1)
    add_cancelling_heads(wiring, 1, (2, 3), generator)
    wiring.match(2, 2, [("letter", "before"), ("before", "earlier")])
    wiring.copy(2, 2, "token", "rest")
    add_junk_head(wiring, 0, 2, generator)
    for layer, head in ((0, 3), (2, 1), (2, 3)):
        add_junk_head(wiring, layer, head, generator, shares=True)
    for layer in range(3):
        add_junk_units(wiring, layer, 8, generator)
