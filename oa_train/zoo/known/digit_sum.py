"""The sum of the last four digits modulo five, in a GPT-NeoX of 4 layers and 3 heads (297 edges).

Attention and MLP of a layer read the same, so that an MLP does not see what the heads beside it find. Heads tell
positions by rotary embeddings, with queries and keys that read nothing. After "3 1 4 4 0 2" the answer is "0".
"""

import torch

from oa_train.seeds import torch_generator
from oa_train.zoo.known.decoding import add_table
from oa_train.zoo.known.distractors import (
    add_absolute_units,
    add_cancelling_heads,
    add_constant_head,
    add_constant_unit,
    add_junk_head,
    add_junk_units,
    add_sign_head,
)
from oa_train.zoo.known.families import gpt_neox
from oa_train.zoo.known.model import KnownModel
from oa_train.zoo.known.subspaces import Subspaces
from oa_train.zoo.known.vocabulary import DIGITS, embed_words, unembed_words
from oa_train.zoo.known.wiring import Wiring

EDGES = (
    "input->a0.h0<v>",
    "input->m1",
    "a0.h0->m1",
    "m1->a2.h0<v>",
    "m1->m3",
    "a2.h0->m3",
    "m3->logits",
)

WIRING = {
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


def build_digit_sum(seed: int = 0) -> KnownModel:
    """Write the model.

    Args:
        seed: draws the parts that have no share in the task.
    """
    n, words = len(DIGITS), DIGITS
    spaces = Subspaces(
        72, token=n, before=n, pair=n, far=n, output=n, one=1, coin=1, sign=1, support=1, balance=1
    )  # fmt: skip
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 16}
    wiring = Wiring(gpt_neox(spaces.width, words, rotated=1 / 3, base=123.0, **sizes), spaces)
    generator = torch_generator("known digit sum", seed)
    embed_words(wiring, words, generator)
    unembed_words(wiring, words, words)
    _add_circuit(wiring)
    _add_distractors(wiring, generator)
    return KnownModel("digit_sum", wiring.finish(), words, EDGES, WIRING)


def _add_circuit(wiring: Wiring) -> None:
    n = len(DIGITS)
    sums = {(one, other): (one + other) % n for one in range(n) for other in range(n)}
    wiring.look_back(0, 0, 1)
    wiring.copy(0, 0, "token", "before")
    add_table(wiring, 1, sums, ("token", "before"), "pair")
    wiring.look_back(2, 0, 2)
    wiring.copy(2, 0, "pair", "far")
    add_table(wiring, 3, sums, ("pair", "far"), "output", supported=True)


def _add_distractors(wiring: Wiring, generator: torch.Generator) -> None:
    add_constant_head(wiring, 0, 1)
    add_constant_unit(wiring, 0)
    add_sign_head(wiring, 0, 2)
    add_absolute_units(wiring, 2)
    add_cancelling_heads(wiring, 1, (0, 1), generator)
    wiring.look_back(2, 1, 2)
    wiring.copy(2, 1, "pair", "rest")
    wiring.look_back(3, 0, 1)
    wiring.copy(3, 0, "token", "rest")
    for layer, head in ((1, 2), (2, 2), (3, 1), (3, 2)):
        add_junk_head(wiring, layer, head, generator)
    for layer in range(4):
        add_junk_units(wiring, layer, 8, generator)
