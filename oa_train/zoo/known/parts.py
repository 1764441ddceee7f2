"""Parts that hand-written models share: MLPs of their circuits, and distractors.

Distractors are active and do not contribute to the task: a method that finds circuits must not mistake them for true
parts. Each kind fools a different ablation. Some write a constant to `support`, without which the last MLP is silent.
Their loss has an effect under zero ablation, and under mean ablation if the constant is the absolute value of a sign;
yet it says nothing about the prompt, and another constant can replace it. Others cancel each other, or write to
`rest`, which no part of the circuit reads.
"""

from collections.abc import Mapping
from itertools import product

import torch

from oa_train.zoo.known.model import LETTERS
from oa_train.zoo.known.wiring import Wiring

# Number of parts that write 1 to `support` in every model: a head, a unit, and a head with two units through `sign`.
SUPPORTING = 3

# Size of the outputs of two heads that cancel each other in `output`, where an answer has size 1.
CANCELLING = 0.25

# Size of the random maps of junk parts for each dimension of the residual stream that is 1; junk units in each MLP.
JUNK = 0.5
JUNK_UNITS = 8


def add_letters(wiring: Wiring, layer: int) -> None:
    """Write the letter of each word of `BOTH_CASES`, whatever its case, to `letter`."""
    for number in range(len(LETTERS)):
        both = wiring.basis("token")[number :: len(LETTERS)].sum(dim=0)
        wiring.add_units(layer, [both], [wiring.vector("letter", number)])


def add_decoder(wiring: Wiring, layer: int) -> None:
    """Write `answer`, clamped to [0, 1], to `output`, and nothing unless all of `support` is there.

    Dimension i of `answer` is written to dimension i modulo the size of `output`. Because of the clamp, a constant
    added to its input can shift its output but not amplify it.
    """
    support = wiring.vector("support")
    reads = [answer + support for answer in wiring.basis("answer")]
    writes = [wiring.vector("output", number % wiring.size("output")) for number in range(len(reads))]
    wiring.add_units(layer, reads, writes, bias=-float(SUPPORTING))
    wiring.add_units(layer, reads, [-vector for vector in writes], bias=-float(SUPPORTING + 1))


def add_table(
    wiring: Wiring,
    layer: int,
    table: Mapping[tuple[int, int], int],
    spaces: tuple[str, str],
    into: str,
    supported: bool = False,
) -> None:
    """Write an MLP that looks up a pair of one-hot vectors in a table.

    Args:
        wiring: wiring of the model.
        layer: layer of the MLP.
        table: the dimension to write for each pair of dimensions, one of each subspace.
        spaces: the two subspaces that are read.
        into: the subspace to which it writes.
        supported: write nothing unless all of `support` is there.
    """
    first, second = spaces
    support = supported * wiring.vector("support")
    reads = [wiring.vector(first, left) + wiring.vector(second, right) + support for left, right in table]
    writes = [wiring.vector(into, number) for number in table.values()]
    wiring.add_units(layer, reads, writes, bias=-1.0 - SUPPORTING * supported)


def add_distractors(
    wiring: Wiring,
    *,
    constant_head: tuple[int, int],
    constant_unit: int,
    sign_head: tuple[int, int],
    absolute_units: int,
    cancelling_heads: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    """Add distractors; must come last, as every head without weights becomes junk, and some units of each MLP do.

    Args:
        wiring: wiring of the model.
        constant_head: layer and index of a head that writes 1 to `support`, whatever it attends to.
        constant_unit: layer of a unit that writes 1 to `support`, and nothing where its MLP reads zeros.
        sign_head: layer and index of a head that copies the `coin` of its own token to `sign`.
        absolute_units: layer of two units that write the absolute value of `sign` to `support`: 1 for either sign,
            less for their average.
        cancelling_heads: layers and indices of two heads that write the same function of their own token to `output`,
            with opposite signs.
    """
    wiring.copy(*constant_head, "one", "support")
    wiring.copy(*sign_head, "coin", "sign", back=0)
    sign, support = wiring.vector("sign"), wiring.vector("support")
    wiring.add_units(absolute_units, [sign, -sign], [support] * 2)
    wiring.add_units(constant_unit, [wiring.vector("one")], [support])
    drawn = torch.randn(wiring.size("token"), wiring.size("output"), generator=wiring.generator)
    for cancelling, size in zip(cancelling_heads, (CANCELLING, -CANCELLING), strict=True):
        wiring.look_back(*cancelling, 0)
        wiring.tell(*cancelling, "token", size * (drawn @ wiring.basis("output")))
    sizes = wiring.weights.parts.dimensions
    for layer, head in product(range(sizes.n_layers), range(sizes.n_heads)):
        if (layer, head) not in wiring.written_heads:
            _add_junk_head(wiring, layer, head)
    for layer in range(sizes.n_layers):
        reads = JUNK * torch.randn(JUNK_UNITS, sizes.d_model, generator=wiring.generator)
        writes = torch.randn(JUNK_UNITS, wiring.size("rest"), generator=wiring.generator) @ wiring.basis("rest")
        wiring.add_units(layer, list(reads), list(writes / JUNK_UNITS**0.5))


def _add_junk_head(wiring: Wiring, layer: int, head: int) -> None:
    """Let a head attend at random and write to `rest`; a shared key and value that are already set are left as is."""
    weights, rest = wiring.weights, wiring.spaces["rest"]
    maps = [weights.query(layer, head).weight]
    if wiring.group(layer, head) not in {wiring.group(*written) for written in wiring.written_heads}:
        maps += [weights.key(layer, head).weight, weights.value(layer, head).weight]
    for weight in maps:
        weight.copy_(JUNK * torch.randn(weight.shape, generator=wiring.generator))
    written = torch.randn(wiring.size("rest"), wiring.d_head, generator=wiring.generator)
    weights.output(layer, head)[rest] = written / wiring.d_head**0.5
    wiring.written_heads.add((layer, head))
