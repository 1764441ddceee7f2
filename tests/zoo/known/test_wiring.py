"""What is written to hand-written models, and what their heads attend to."""

from functools import partial

import pytest
import torch

from oa_train.zoo.known.families import gpt2, gpt_neox, llama
from oa_train.zoo.known.wiring import Wiring, subspaces

WORDS = tuple("abcd")
LENGTH = 14
SIZES = {"n_layers": 1, "n_heads": 2, "n_units": 4, "n_positions": 16}


def wiring_of(family: str) -> Wiring:
    spaces = subspaces(64, token=4, position=16, copied=4, output=4)
    if family == "gpt2":
        model = gpt2(64, WORDS, **SIZES)
    else:
        del spaces["position"]
        neox, grouped = partial(gpt_neox, rotated=0.25, base=123.0), partial(llama, base=2e7, n_groups=1)
        model = (neox if family == "gpt_neox" else grouped)(64, WORDS, **SIZES)
    return Wiring(model, spaces, WORDS, WORDS, torch.Generator().manual_seed(0))


def test_subspaces_follow_each_other_and_the_rest_is_left() -> None:
    spaces = subspaces(12, first=3, second=3)
    assert list(spaces) == ["first", "second", "one", "coin", "sign", "support", "balance", "rest"]
    assert [spaces[name] for name in ("first", "second", "one", "rest")] == [
        slice(0, 3), slice(3, 6), slice(6, 7), slice(11, 12)
    ]  # fmt: skip


def test_subspaces_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="16 dimensions do not fit in a space of 10"):
        subspaces(10, first=5, second=6)


def test_words_and_positions_are_embedded_and_answers_unembedded() -> None:
    wiring = wiring_of("gpt2")
    embedding, spaces = wiring.weights.embedding, wiring.spaces
    assert torch.equal(embedding[3:, spaces["token"]], torch.eye(4))
    assert embedding[:, spaces["one"]].flatten().tolist() == [1, 0, 0, 1, 1, 1, 1]
    assert sorted(embedding[3:, spaces["coin"]].flatten().tolist()) == [-1, -1, 1, 1]
    assert not embedding[1:3].any()
    assert torch.equal(wiring.weights.positions, wiring.basis("position"))
    assert torch.equal(wiring.weights.unembedding[3:], 12 * wiring.basis("output"))


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
    scores = attention(wiring, tokens)[1]
    places = torch.arange(back, LENGTH)
    assert (scores[places, places - back] > 1 - 1e-6).all()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_heads_attend_to_what_matches(family: str) -> None:
    wiring = wiring_of(family)
    wiring.match(0, 0, [("token", "token")])
    tokens = [0, 3, 4, 5, 6, 4, 3]
    scores = attention(wiring, tokens)[0]
    for place, token in enumerate(tokens[1:], start=1):
        same = torch.tensor([other == token for other in tokens])
        assert scores[place, same].sum() > 1 - 1e-6


def test_heads_that_share_a_value_carry_what_both_copy() -> None:
    wiring = wiring_of("llama")
    wiring.copy(0, 0, "one", "copied")
    wiring.copy(0, 1, "token", "copied")
    assert torch.equal(wiring.weights.value(0, 0).weight[0], wiring.vector("one"))
    assert torch.equal(wiring.weights.value(0, 0).weight[1:5], wiring.basis("token"))
    assert wiring.weights.output(0, 1)[:, 0].abs().sum() == 0
    assert torch.equal(wiring.weights.output(0, 1)[:, 1:5], wiring.basis("copied").T)
