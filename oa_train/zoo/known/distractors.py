"""Parts that do something and have no share in the task: what finds circuits must not take them for true ones.

Each kind fools another ablation. What the model says relies on `support`, a direction in which some of them write a
constant. Its loss is noticed under zero ablation, and under mean ablation where the constant is the absolute value of
a sign; yet it tells nothing of the prompt, and another constant can stand in for it. Others cancel each other, or
write where nothing of the task reads.

They use subspaces of these names: `token`, `one` (1 at every word), `coin` (a sign of each word), `sign`, `support`,
`output` and `rest`, which nothing reads but junk.
"""

from collections.abc import Sequence

import torch

from oa_train.shapes import Tensor
from oa_train.zoo.known.wiring import Wiring

# How many parts write 1 to `support`, in every model: a head, a unit, and a head and two units through `sign`.
SUPPORTING = 3

# Size of what each of two heads that cancel writes to `output`, where an answer is 1.
CANCELLING = 0.25

# Size of the random maps of junk, for each dimension of the residual stream that is 1.
JUNK = 0.5


def add_constant_head(wiring: Wiring, layer: int, head: int) -> None:
    """A head that writes 1 to `support`, whatever it attends to."""
    wiring.copy(layer, head, "one", "support")


def add_constant_unit(wiring: Wiring, layer: int) -> None:
    """A unit that writes 1 to `support` at every word, and nothing where its MLP reads zeros."""
    wiring.add_units(layer, [wiring.vector("one")], [wiring.vector("support")])


def add_sign_head(wiring: Wiring, layer: int, head: int) -> None:
    """A head that copies the `coin` of its own token to `sign`."""
    wiring.look_back(layer, head, 0)
    wiring.copy(layer, head, "coin", "sign")


def add_absolute_units(wiring: Wiring, layer: int) -> None:
    """Two units that write the absolute value of `sign` to `support`: 1 for either sign, less for their average."""
    sign = wiring.vector("sign")
    wiring.add_units(layer, [sign, -sign], [wiring.vector("support")] * 2)


def add_cancelling_heads(wiring: Wiring, layer: int, heads: Sequence[int], generator: torch.Generator) -> None:
    """Two heads that write the same about their own token to `output`, with opposite signs.

    Args:
        wiring: of the model.
        layer: of the heads.
        heads: the two; they share keys and values with no third head.
        generator: draws what they write.
    """
    spaces = wiring.spaces
    written = torch.zeros(spaces.size("token"), spaces.width)
    written[:, spaces["output"]] = torch.randn(len(written), spaces.size("output"), generator=generator)
    for head, sign in zip(heads, (1, -1), strict=True):
        wiring.look_back(layer, head, 0)
        wiring.tell(layer, head, "token", sign * CANCELLING * written)


def add_junk_head(wiring: Wiring, layer: int, head: int, generator: torch.Generator, shares: bool = False) -> None:
    """A head that attends at random and writes to `rest`.

    Args:
        wiring: of the model.
        layer: of the head.
        head: its number.
        generator: draws its weights.
        shares: leave key and value as the heads have made them with which this one shares them.
    """
    query, key = _attention_weights(wiring, layer, head)
    query.copy_(_random_like(query, generator))
    if not shares:
        value = wiring.weights.value(layer, head).weight
        key.copy_(_random_like(key, generator))
        value.copy_(_random_like(value, generator))
    rest = wiring.spaces["rest"]
    written = wiring.weights.output(layer, head)
    written[rest] = torch.randn(written[rest].shape, generator=generator) / wiring.d_head**0.5


def add_junk_units(wiring: Wiring, layer: int, count: int, generator: torch.Generator) -> None:
    """Units that read at random and write to `rest`."""
    reads = JUNK * torch.randn(count, wiring.spaces.width, generator=generator)
    writes = torch.zeros(count, wiring.spaces.width)
    writes[:, wiring.spaces["rest"]] = torch.randn(count, wiring.spaces.size("rest"), generator=generator) / count**0.5
    wiring.add_units(layer, list(reads), list(writes))


def _attention_weights(wiring: Wiring, layer: int, head: int) -> tuple[Tensor, Tensor]:
    return wiring.weights.query(layer, head).weight, wiring.weights.key(layer, head).weight


def _random_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    return JUNK * torch.randn(weight.shape, generator=generator)
