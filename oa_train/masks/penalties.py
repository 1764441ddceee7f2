"""Penalties that make masks sparse: a fixed price for each kept entry, or a price that leads to a given size."""

import math
from abc import abstractmethod

import torch
from torch import nn

from oa_train.errors import ConfigurationError
from oa_train.masks.base import MaskDistribution
from oa_train.shapes import Float, Int, Tensor

# The price carries this power of expected size / goal. The reaction is at once, before an entry is gone, which keeps
# the price from overshooting while entries are on their way.
PROPORTIONAL_POWER = 4.0

# The controller sees no size as more than e times the goal, or less than the e-th part of it.
LARGEST_ERROR = 1.0

# Relative distance from the target within which a size counts as reached; the nearest whole size always does.
TOLERANCE = 0.05

# Nats. No loss counts for more, nor for less than its negative, so that every circuit of the right size ranks before
# all of a wrong one.
LARGEST_LOSS = 1000.0


class NodeRegulariser(nn.Module):
    """Counts edges once more at every node, and the further ones of a node for less and less.

    With E the expected number of kept edges that enter or leave a node, and M nodes in all, a node adds
    (M / 2) * tanh(2 E / M). So the last edges of a node that has few cost more than another edge of a busy one, which
    empties nodes (Li & Janson 2024).

    Args:
        weight: what this is multiplied with, as a part of the price of an edge.
        entries: entries of the distribution that enter or leave a node; one that does both to different nodes, or
            serves several, stands here several times.
        nodes: the node of each of them.
        n_nodes: how many nodes there are.

    Raises:
        ConfigurationError: the weight is negative or not finite.
    """

    def __init__(
        self, weight: float, entries: Int[Tensor, " pair"], nodes: Int[Tensor, " pair"], n_nodes: int
    ) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigurationError(f"node_penalty is {weight}; expected a part of the penalty, at least 0.")
        self.weight = weight
        self.entries: Tensor
        self.nodes: Tensor
        self.register_buffer("entries", entries, persistent=False)
        self.register_buffer("nodes", nodes, persistent=False)
        self.n_nodes = n_nodes

    def forward(self, distribution: MaskDistribution) -> Float[Tensor, ""]:
        """What is added to the expected size, with gradients to the distribution."""
        each = distribution.keep_probability()
        edges = torch.zeros(self.n_nodes, dtype=each.dtype, device=each.device)
        edges = edges.index_add(0, self.nodes, each[self.entries])
        most = self.n_nodes / 2
        return self.weight * most * torch.tanh(edges / most).sum()


class Penalty(nn.Module):
    """The expected number of kept entries times a price.

    Args:
        weight: price of one kept entry in nats, at the start of training.
        regulariser: adds to the number.

    Raises:
        ConfigurationError: the weight is negative or not finite.
    """

    def __init__(self, weight: float, regulariser: NodeRegulariser | None = None) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigurationError(f"penalty is {weight}; expected a price in nats for each kept entry, at least 0.")
        self.weight = weight
        self.regulariser = regulariser

    @property
    @abstractmethod
    def price(self) -> Float[Tensor, ""] | float:
        """What a kept entry costs now, in nats; never negative."""

    @abstractmethod
    def objective(self, loss: Float[Tensor, ""], size: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """What the best checkpoint minimises.

        Args:
            loss: loss of the discrete circuit in nats, the KL divergence for instance.
            size: how many entries it keeps, those that are never ablated included.
        """

    def update(self, distribution: MaskDistribution, size: Int[Tensor, ""]) -> None:
        """Set the price for the next step; called once after every optimiser step.

        Args:
            distribution: the masks as they are now.
            size: of the circuit that they are cut off to, entries that are never ablated included.
        """

    def forward(self, distribution: MaskDistribution) -> Float[Tensor, ""]:
        """The penalty in nats, with gradients to the distribution."""
        size = distribution.expected_size()
        return self.price * (size if self.regulariser is None else size + self.regulariser(distribution))


class SizePenalty(Penalty):
    """A fixed price: keeping an entry must lower the KL divergence by more than `weight` nats."""

    @property
    def price(self) -> float:
        """The weight."""
        return self.weight

    def objective(self, loss: Float[Tensor, ""], size: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """Loss plus the price of the circuit, in nats."""
        return loss + self.weight * size


class TargetSize(Penalty):
    """A price that leads to a circuit of a given size: a Lagrange multiplier, kept by a controller.

    The goal falls linearly from all entries to the target in the first `warmup` optimiser steps and stays there.
    All sizes counted without the entries that are never ablated, the price of a kept entry is

        weight * exp(rate * sum over the steps so far of log(kept / goal)) * (expected / goal) ^ PROPORTIONAL_POWER

    with `kept` the size of the discrete circuit and `expected` the size that is penalised. It rises while the masks
    are too large and falls while they are too small; the sum rests when the discrete mask has the right size, however
    many entries that are nearly off add up to. Only ratios of sizes and of prices enter, so the same rule serves few
    entries and many and a loss of any scale, and the price is always positive.

    Args:
        target: how many entries are to be kept, those that are never ablated included.
        n_entries: number of entries of the distribution.
        weight: price of one kept entry at the start, in nats; more than 0, because the price moves by factors.
        warmup: optimiser steps in which the goal falls to the target, at least 1.
        rate: how fast the price moves: the change of its logarithm in one step at a size e times the goal. The
            learning rate of the masks suits, so that prices move no faster than the logits that answer them.
        always_kept: entries that belong to no distribution because they are never ablated.
        regulariser: adds to the number of kept entries.

    Attributes:
        log_price: buffer; log of the price without its last factor.
        excess: buffer; log(expected / goal) after the latest step.
        steps: buffer; optimiser steps so far.

    Raises:
        ConfigurationError: the target cannot be reached, or another argument is out of its range.
    """

    def __init__(
        self,
        target: float,
        n_entries: int,
        *,
        weight: float,
        warmup: int,
        rate: float = 0.05,
        always_kept: int = 0,
        regulariser: NodeRegulariser | None = None,
    ) -> None:
        super().__init__(weight, regulariser)
        if weight == 0:
            raise ConfigurationError(
                "penalty is 0; with target_size it is the price in nats from which the search starts, in factors: "
                "expected more than 0, for instance 0.05."
            )
        if not always_kept < target <= always_kept + n_entries:
            raise ConfigurationError(
                f"target_size is {target}; expected more than {always_kept} and at most {always_kept + n_entries}. It "
                f"counts the whole circuit: the {n_entries} parts that may be ablated, and the {always_kept} "
                "that are always kept because `components` does not select them."
            )
        if warmup < 1:
            raise ConfigurationError(f"target_warmup is {warmup}; expected at least 1 optimiser step.")
        self.target = target
        self.n_entries = n_entries
        self.warmup = warmup
        self.rate = rate
        self.always_kept = always_kept
        self.log_price: Tensor
        self.register_buffer("log_price", torch.tensor(math.log(weight)))
        self.excess: Tensor
        self.register_buffer("excess", torch.tensor(0.0))
        self.steps: Tensor
        self.register_buffer("steps", torch.tensor(0))

    @property
    def price(self) -> Float[Tensor, ""]:
        """What a kept entry costs now, in nats."""
        return (self.log_price + PROPORTIONAL_POWER * self.excess).exp()

    @torch.no_grad()
    def update(self, distribution: MaskDistribution, size: Int[Tensor, ""]) -> None:
        """Raise the price while the masks are larger than the goal, lower it while they are smaller."""
        self.steps += 1
        done = (self.steps / self.warmup).clamp(max=1.0)
        goal = self.n_entries + done * (self.target - self.always_kept - self.n_entries)
        self.log_price += self.rate * _log_ratio(size - self.always_kept, goal)
        self.excess.copy_(_log_ratio(distribution.expected_size(), goal))

    def objective(self, loss: Float[Tensor, ""], size: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """The loss, at the target size or within 5 % of it; elsewhere more than any such, the farther the more."""
        distance = (size - self.target).abs()
        # A target may lie between two whole sizes; the nearest one is always near enough.
        reached = distance <= max(0.5, TOLERANCE * (self.target - self.always_kept))
        return loss.clamp(-LARGEST_LOSS, LARGEST_LOSS) + (~reached) * LARGEST_LOSS * (2 + distance)


def _log_ratio(size: Tensor, goal: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return (size / goal).log().clamp(-LARGEST_ERROR, LARGEST_ERROR)
