"""Circuits to compare with: random ones of a given size."""

import torch

from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError
from oa_train.models.components import Components
from oa_train.seeds import torch_generator


def random_circuits(components: Components, size: int, n_circuits: int, seed: int) -> list[Circuit]:
    """Draw circuits of equal size, each component being equally likely.

    Args:
        components: all components of the model.
        size: kept components of each circuit.
        n_circuits: how many.
        seed: the same seed draws the same circuits.

    Raises:
        ConfigurationError: the model has fewer components than that.
    """
    if not 0 <= size <= len(components):
        raise ConfigurationError(f"A circuit of {size} of {len(components)} components cannot be drawn.")
    circuits = []
    for index in range(n_circuits):
        order = torch.randperm(len(components), generator=torch_generator(seed, "random circuit", index))
        circuits.append(Circuit(components, tuple(components.names[i] for i in order[:size].tolist())))
    return circuits
