"""Circuits to compare with: random ones of a given size."""

from collections.abc import Sequence

import torch

from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError
from oa_train.models.components import Components
from oa_train.seeds import torch_generator


def random_circuits(
    components: Components, size: int, n_circuits: int, seed: int, among: Sequence[str] | None = None
) -> list[Circuit]:
    """Draw circuits of equal size, each component being equally likely.

    Args:
        components: all components of the model.
        size: kept components of each circuit.
        n_circuits: how many.
        seed: the same seed draws the same circuits.
        among: the components that may be left out; the others are always kept. All by default.

    Raises:
        ConfigurationError: the model has fewer components than that.
    """
    drawn = list(components.names if among is None else among)
    fixed = [name for name in components.names if name not in set(drawn)]
    if not len(fixed) <= size <= len(components):
        raise ConfigurationError(f"A circuit of {size} of {len(components)} components cannot be drawn.")
    circuits = []
    for index in range(n_circuits):
        order = torch.randperm(len(drawn), generator=torch_generator(seed, "random circuit", index))
        chosen = [drawn[i] for i in order[: size - len(fixed)].tolist()]
        circuits.append(Circuit(components, (*fixed, *chosen)))
    return circuits
