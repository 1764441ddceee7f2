"""What keeping parts costs, in each of the circuits that are trained side by side."""

from dataclasses import asdict, dataclass
from typing import Any

from oa_train.errors import ConfigurationError
from oa_train.masks.penalty import NodeRegulariser, Penalty, SizePenalty, TargetSize
from oa_train.models.graph import Graph
from oa_train.training.parts import MaskedParts


@dataclass(frozen=True)
class Prices:
    """Prices or target sizes, as they were asked for; see `CircuitModule`.

    Attributes:
        penalty: price of a kept part in nats; a list has one for each circuit.
        node_penalty: what the edges of a head cost more while it has few, as a part of the price.
        target_size: parts that a circuit is to have, if that is asked for; a list has one for each circuit.
        target_warmup: optimiser steps in which the goal falls to that size.

    Raises:
        ConfigurationError: a number is out of its range, or lists are empty or of different lengths.
    """

    penalty: float | list[float]
    node_penalty: float
    target_size: float | list[float] | None
    target_warmup: int

    def __post_init__(self) -> None:
        lengths = {len(one) for one in (self.penalty, self.target_size) if isinstance(one, list)}
        if len(lengths) > 1 or 0 in lengths:
            raise ConfigurationError(
                f"penalty is {self.penalty} and target_size {self.target_size}; expected a number, or lists of one "
                "length, an entry for each circuit."
            )
        if self.target_size is not None and not self.target_warmup > 0:
            raise ConfigurationError(f"target_warmup is {self.target_warmup}; expected more than 0.")
        SizePenalty(self.penalty)

    @property
    def n_circuits(self) -> int:
        """How many circuits are asked for."""
        return next((len(one) for one in (self.penalty, self.target_size) if isinstance(one, list)), 1)

    def asked(self, number: int) -> dict[str, float]:
        """Price, and target size if there is one, of one circuit."""
        given: dict[str, Any] = {"penalty": self.penalty, "target_size": self.target_size}
        return {name: one[number] if isinstance(one, list) else one for name, one in given.items() if one is not None}

    def settings(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def make(self, masked: MaskedParts, rate: float) -> Penalty:
        """The penalty on all circuits.

        Args:
            masked: the parts that masks are drawn for.
            rate: how fast a price moves that leads to a size.
        """
        weight = self.penalty if isinstance(self.penalty, list) else [self.penalty] * self.n_circuits
        regulariser = None
        if isinstance(masked.parts, Graph) and self.node_penalty:
            entries, heads = masked.selected_pairs(*masked.parts.edges_at_heads)
            n_heads = masked.parts.n_layers * masked.parts.n_heads
            regulariser = NodeRegulariser(self.node_penalty, entries, heads, n_heads)
        if self.target_size is None:
            return SizePenalty(weight, regulariser)
        return TargetSize(
            self.target_size,
            masked.n_selected,
            weight=weight,
            warmup=self.target_warmup,
            rate=rate,
            always_kept=masked.n_fixed,
            regulariser=regulariser,
        )
