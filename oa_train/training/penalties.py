"""The penalties that a configuration names, for circuits that are trained side by side."""

from dataclasses import dataclass
from typing import Any

import torch

from oa_train.checks import check_positive
from oa_train.errors import ConfigurationError
from oa_train.masks.penalty import NodeRegulariser, SizePenalty, TargetSize
from oa_train.training.circuit_masks import CircuitMasks

PenaltyWeight = float | list[float] | dict[str, float]


@dataclass(frozen=True)
class PenaltySettings:
    """Penalty weights or target sizes; see `CircuitModule`.

    Attributes:
        penalty_weight: price of a kept entry in nats; a list has one for each circuit, a mapping one for each kind of
            site.
        node_penalty: surcharge on the edges of heads with few edges, as a fraction of the penalty weight.
        target_size: entries that a circuit should have; None fixes the weight; a list has one for each circuit.
        target_warmup: optimiser steps in which the goal falls to that size.

    Raises:
        ConfigurationError: a number is out of its range, or lists are empty or of different lengths.
    """

    penalty_weight: PenaltyWeight
    node_penalty: float
    target_size: float | list[float] | None
    target_warmup: int

    def __post_init__(self) -> None:
        lengths = {len(value) for value in (self.penalty_weight, self.target_size) if isinstance(value, list)}
        if len(lengths) > 1 or 0 in lengths:
            raise ConfigurationError(
                f"penalty_weight is {self.penalty_weight} and target_size {self.target_size}; expected a number, or "
                "lists of the same length, with an entry for each circuit."
            )
        if self.target_size is not None:
            check_positive(target_warmup=self.target_warmup)
        weight = self.penalty_weight
        if isinstance(weight, dict) and not any(weight.values()):
            raise ConfigurationError("penalty_weight has no kind of site with a weight above 0.")
        SizePenalty(list(weight.values()) if isinstance(weight, dict) else weight)  # checks the numbers

    @property
    def n_circuits(self) -> int:
        """Number of circuits."""
        lists = (value for value in (self.penalty_weight, self.target_size) if isinstance(value, list))
        return next((len(value) for value in lists), 1)

    def of_circuit(self, number: int) -> dict[str, Any]:
        """Penalty weight, and target size if there is one, of one circuit."""
        values = {"penalty_weight": self.penalty_weight, "target_size": self.target_size}
        chosen = {name: value for name, value in values.items() if value is not None}
        return {name: value[number] if isinstance(value, list) else value for name, value in chosen.items()}

    @property
    def target_sizes(self) -> list[int]:
        """Target size of each circuit in whole entries; empty without one."""
        if self.target_size is None:
            return []
        targets = self.target_size if isinstance(self.target_size, list) else [self.target_size] * self.n_circuits
        return [max(1, round(target)) for target in targets]

    def make(self, masks: CircuitMasks, rate: float) -> SizePenalty:
        """The penalty on all circuits; `rate` is the speed of a penalty weight that leads to a target size.

        Raises:
            ConfigurationError: weights by kind do not name the kinds of site that are selected.
        """
        weight, relative = self.penalty_weight, None
        if isinstance(weight, dict):
            # The largest weight is the one that is reported and adjusted; the others keep their ratio to it.
            largest = max(weight.values())
            relative = self._relative_weights(masks, weight, largest)
            weight = largest
        weights = weight if isinstance(weight, list) else [weight] * self.n_circuits
        regulariser = self._regulariser(masks)
        if self.target_size is None:
            return SizePenalty(weights, regulariser, relative)
        return TargetSize(
            self.target_size,
            masks.n_selected,
            weight=weights,
            warmup=self.target_warmup,
            rate=rate,
            always_kept=masks.n_fixed,
            regulariser=regulariser,
            relative=relative,
        )

    @staticmethod
    def _relative_weights(masks: CircuitMasks, weights: dict[str, float], largest: float) -> torch.Tensor:
        kinds, of_entries = masks.level.entry_kinds
        selected = of_entries[masks.selection.cpu()]
        wanted = {kinds[number] for number in selected.unique().tolist()}
        if wanted != set(weights):
            raise ConfigurationError(
                f"penalty_weight names the kinds {', '.join(sorted(weights))}; expected one for each kind that can be "
                f"ablated: {', '.join(sorted(wanted))}."
            )
        return torch.tensor([weights.get(kind, 0.0) / largest for kind in kinds])[selected]

    def _regulariser(self, masks: CircuitMasks) -> NodeRegulariser | None:
        if not self.node_penalty:
            return None
        pairs = masks.level.entries_at_nodes()
        assert pairs is not None  # see `check_level`
        entries, nodes, n_nodes = pairs
        numbers = masks.selection.cumsum(dim=0) - 1
        chosen = masks.selection[entries]
        return NodeRegulariser(self.node_penalty, numbers[entries[chosen]], nodes[chosen], n_nodes)
