"""Circuits to compare with: random ones of a given size."""

from collections.abc import Sequence

import torch

from oa_train.circuits.circuit import Circuit
from oa_train.models.pruning import highest_circuit
from oa_train.errors import ConfigurationError
from oa_train.models.selection import Components
from oa_train.models.graph import Graph
from oa_train.seeds import torch_generator

# Orders that are drawn for one circuit; if all of them lead to fewer edges the largest circuit is taken.
MOST_ATTEMPTS = 100


def random_circuits(
    parts: Components | Graph, size: int, n_circuits: int, seed: int, among: Sequence[str] = ("*",)
) -> list[Circuit]:
    """Draw circuits of equal size.

    Components are drawn with equal chances. Edges are taken in a random order until those among them that lie on a way
    from the input to the logits are as many as there should be (see `within_budget`); an order that leads to fewer is
    drawn again.

    Args:
        parts: all components of the model, or the graph of its edges.
        size: kept parts of each circuit.
        n_circuits: how many.
        seed: the same seed draws the same circuits.
        among: shell patterns of the parts that may be left out; the others are kept, unless they are edges that then
            lead nowhere.

    Raises:
        ConfigurationError: there are fewer parts than that.
    """
    drawn = parts.mask(parts.select(among)).nonzero().flatten()
    # Of edges that are always kept some may lead nowhere, and be gone.
    least = 0 if isinstance(parts, Graph) else len(parts) - len(drawn)
    if not least <= size <= len(parts):
        raise ConfigurationError(f"A circuit of {size} of {len(parts)} parts of the model cannot be drawn.")

    def circuit(index: int, attempt: int) -> Circuit:
        which = (index, attempt) if attempt else (index,)
        order = torch.randperm(len(drawn), generator=torch_generator(seed, "random circuit", *which))
        scores = torch.ones(len(parts))
        scores[drawn[order]] = -torch.arange(len(drawn)).float()
        return Circuit.from_mask(parts, highest_circuit(parts, scores, size))

    def of_size(index: int) -> Circuit:
        attempts = (circuit(index, attempt) for attempt in range(MOST_ATTEMPTS))
        drawn_so_far = []
        for one in attempts:
            if len(one) == size:
                return one
            drawn_so_far.append(one)
        return max(drawn_so_far, key=len)

    return [of_size(index) for index in range(n_circuits)]
