"""MLPs of hand-written models: merging cases, looking pairs up, and turning what was found into what logits read."""

from collections.abc import Mapping

from oa_train.zoo.known.distractors import SUPPORTING
from oa_train.zoo.known.vocabulary import BOTH_CASES, LETTERS
from oa_train.zoo.known.wiring import Wiring


def add_letters(wiring: Wiring, layer: int) -> None:
    """Write the letter of each word of `BOTH_CASES`, whatever its case, to `letter`."""
    for number in range(len(LETTERS)):
        both = wiring.basis("token")[number :: len(LETTERS)].sum(dim=0)
        wiring.add_units(layer, [both], [wiring.vector("letter", number)])
    assert len(BOTH_CASES) == 2 * len(LETTERS)


def add_decoder(wiring: Wiring, layer: int, n_outputs: int) -> None:
    """Write `answer`, cut off below 0 and above 1, to `output`, and nothing unless all of `support` is there.

    Being cut off it cannot be made to shout: a constant added to what it reads shifts it and amplifies nothing.

    Args:
        wiring: of the model.
        layer: of the MLP.
        n_outputs: dimension i of `answer` is written to dimension i modulo this number of `output`.
    """
    support = wiring.vector("support")
    reads = [answer + support for answer in wiring.basis("answer")]
    writes = [wiring.vector("output", number % n_outputs) for number in range(len(reads))]
    wiring.add_units(layer, reads, writes, bias=-float(SUPPORTING))
    wiring.add_units(layer, reads, [-one for one in writes], bias=-float(SUPPORTING + 1))


def add_table(
    wiring: Wiring,
    layer: int,
    table: Mapping[tuple[int, int], int],
    spaces: tuple[str, str],
    into: str,
    supported: bool = False,
) -> None:
    """Look a pair of one-hot vectors up in a table.

    Args:
        wiring: of the model.
        layer: of the MLP.
        table: for each pair of dimensions, one of each subspace, the dimension to write.
        spaces: the two subspaces that are read.
        into: the subspace that is written.
        supported: write nothing unless all of `support` is there.
    """
    first, second = spaces
    support = wiring.vector("support") if supported else wiring.vector("support") * 0
    reads = [wiring.vector(first, one) + wiring.vector(second, other) + support for one, other in table]
    writes = [wiring.vector(into, found) for found in table.values()]
    wiring.add_units(layer, reads, writes, bias=-1.0 - (SUPPORTING if supported else 0))
