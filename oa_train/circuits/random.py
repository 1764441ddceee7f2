"""Random circuits of a given size, as controls."""

from collections.abc import Sequence

import torch

from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError
from oa_train.models.levels import Level
from oa_train.seeds import torch_generator

# Number of orders drawn for one circuit; if all give fewer edges than asked for, the largest circuit is taken.
MOST_ATTEMPTS = 100


def random_circuits(
    level: Level, size: int, n_circuits: int, seed: int, among: Sequence[str] = ("*",)
) -> list[Circuit]:
    """Draw random circuits of equal size.

    Entries are taken in a random order; edges until enough of them lie on a path from the input to the logits (see
    `within_budget`), and an order that leads to fewer is drawn again. Only entries that the patterns `among` select
    may be left out; the others are kept, unless they are dangling edges.

    Raises:
        ConfigurationError: the level has fewer entries than `size`, or more are always kept.
    """
    drawn = level.selected(among).nonzero().flatten()
    always_kept = torch.ones(1, len(level), dtype=torch.bool)
    always_kept[0, drawn] = False
    # Some edges that are always kept may dangle; those are removed.
    fewest = int(level.prune(always_kept).sum())
    if not fewest <= size <= len(level):
        raise ConfigurationError(f"A circuit of {size} of {len(level)} parts of the model cannot be drawn.")

    def circuit(index: int, attempt: int) -> Circuit:
        key = (index, attempt) if attempt else (index,)
        order = torch.randperm(len(drawn), generator=torch_generator(seed, "random circuit", *key))
        scores = torch.ones(len(level))
        scores[drawn[order]] = -torch.arange(len(drawn)).float()
        return Circuit.from_mask(level, level.largest(scores, size))

    def of_size(index: int) -> Circuit:
        largest = circuit(index, 0)
        for attempt in range(1, MOST_ATTEMPTS):
            if len(largest) == size:
                break
            largest = max(largest, circuit(index, attempt), key=len)
        return largest

    return [of_size(index) for index in range(n_circuits)]
