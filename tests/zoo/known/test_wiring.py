"""Where hand-written heads attend to."""

import pytest
import torch

from oa_train.zoo.known.families import gpt2, gpt_neox, llama
from oa_train.zoo.known.subspaces import Subspaces
from oa_train.zoo.known.vocabulary import embed_words
from oa_train.zoo.known.wiring import Wiring

WORDS = tuple("abcd")
LENGTH = 14
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4, "max_position_embeddings": 16}


def wiring_of(family: str) -> Wiring:
    spaces = Subspaces(64, token=4, position=16, one=1, coin=1, found=4, balance=1)
    if family == "gpt2":
        model = gpt2(64, WORDS, n_layer=1, n_head=2, n_inner=4, n_positions=16)
    elif family == "gpt_neox":
        model = gpt_neox(64, WORDS, rotated=0.25, base=123.0, **SIZES)
    else:
        model = llama(64, WORDS, base=2e7, num_key_value_heads=1, **SIZES)
    wiring = Wiring(model, spaces)
    embed_words(wiring, WORDS, torch.Generator().manual_seed(0))
    if family == "gpt2":
        wiring.write_positions()
    return wiring


def attention(wiring: Wiring, tokens: list[int]) -> torch.Tensor:
    """What each head attends to, [head, query, key]."""
    model = wiring.finish()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), output_attentions=True).attentions[0][0]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("back", [0, 1, 2])
def test_heads_look_back(family: str, back: int) -> None:
    wiring = wiring_of(family)
    wiring.look_back(0, 1, back)
    tokens = [0, *torch.randint(3, 7, (LENGTH - 1,), generator=torch.Generator().manual_seed(2)).tolist()]
    found = attention(wiring, tokens)[1]
    places = torch.arange(back, LENGTH)
    assert (found[places, places - back] > 1 - 1e-6).all()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_heads_attend_to_what_matches(family: str) -> None:
    wiring = wiring_of(family)
    wiring.match(0, 0, [("token", "token")])
    tokens = [0, 3, 4, 5, 6, 4, 3]
    found = attention(wiring, tokens)[0]
    for place, token in enumerate(tokens[1:], start=1):
        same = torch.tensor([other == token for other in tokens])
        assert found[place, same].sum() > 1 - 1e-6


def test_heads_that_share_a_value_carry_what_both_copy() -> None:
    wiring = wiring_of("llama")
    wiring.copy(0, 0, "one", "found")
    wiring.copy(0, 1, "token", "found")
    assert torch.equal(wiring.weights.value(0, 0).weight[0], wiring.vector("one"))
    assert torch.equal(wiring.weights.value(0, 0).weight[1:5], wiring.basis("token"))
    assert wiring.weights.output(0, 1)[:, 0].abs().sum() == 0
    assert torch.equal(wiring.weights.output(0, 1)[:, 1:5], wiring.basis("found").T)
