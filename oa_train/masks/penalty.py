"""Penalties that make masks sparse: a fixed weight on each kept entry, or a weight adjusted to reach a given size.

Several circuits may be penalised at once: weights, sizes and penalties then have an entry for each circuit.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from oa_train.checks import check_at_least
from oa_train.errors import ConfigurationError
from oa_train.shapes import Bool, Float, Int, Tensor

# The weight has this power of (smooth size / goal) as a factor: a proportional term. It reacts before entries are
# gone, which keeps the weight from overshooting.
PROPORTIONAL_POWER = 4.0

# Power of the odds in `smooth_size`.
SHARPNESS = 4.0

# The controller clamps size / goal to between 1 / e and e.
LARGEST_ERROR = 1.0


class NodeRegulariser(nn.Module):
    """A saturating count of the edges at every node, under which nodes with few edges lose them all.

    With E the expected number of kept edges that enter or leave a node, and M nodes in all, a node adds
    (M / 2) * tanh(2 E / M) (Li & Janson 2024).

    Args:
        weight: weight of this term, as a fraction of the weight of an edge; at least 0.
        entries: entries of the distribution that enter or leave a node, once for each such node.
        nodes: the node of each of these entries.
        n_nodes: number of nodes, M.
    """

    def __init__(
        self, weight: float, entries: Int[Tensor, " pair"], nodes: Int[Tensor, " pair"], n_nodes: int
    ) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigurationError(f"node_penalty is {weight}; expected a fraction of penalty_weight, at least 0.")
        self.weight = weight
        self.entries = nn.Buffer(entries, persistent=False)
        self.nodes = nn.Buffer(nodes, persistent=False)
        self.n_nodes = n_nodes

    def forward(self, probabilities: Float[Tensor, "*circuits entry"]) -> Float[Tensor, "*circuits"]:
        """Term to add to the expected size, with gradients to the keep-probabilities."""
        edges = probabilities.new_zeros(*probabilities.shape[:-1], self.n_nodes)
        edges = edges.index_add(-1, self.nodes, probabilities[..., self.entries])
        most = self.n_nodes / 2
        return self.weight * most * torch.tanh(edges / most).sum(dim=-1)


class SizePenalty(nn.Module):
    """The expected number of kept entries times a weight: keeping one must lower the loss by more than that.

    Args:
        weight: penalty weight of a kept entry in nats, at least 0; for all circuits, or a list with one each.
        regulariser: adds a term to the expected number.
        relative: how much each entry counts; 1 for all of them by default.
    """

    def __init__(
        self,
        weight: float | Sequence[float],
        regulariser: NodeRegulariser | None = None,
        relative: Float[Tensor, " entry"] | None = None,
    ) -> None:
        super().__init__()
        if not all(math.isfinite(value) and value >= 0 for value in _as_list(weight)):
            raise ConfigurationError(
                f"penalty_weight is {weight}; expected a price in nats for each kept entry, at least 0."
            )
        self.regulariser = regulariser
        self.relative = None if relative is None else nn.Buffer(relative, persistent=False)
        self.initial_weight = nn.Buffer(torch.tensor(weight, dtype=torch.float32), persistent=False)

    @property
    def weight(self) -> Float[Tensor, "*circuits"]:
        """Current price of a kept entry in nats; never negative."""
        return self.initial_weight

    def objective(
        self, loss: Float[Tensor, "*circuits"], kept: Bool[Tensor, "*circuits entry"], always_kept: int
    ) -> Float[Tensor, "*circuits"]:
        """Objective that the best checkpoint minimises: loss and penalty of the discrete circuit, in nats.

        `kept` marks the entries of the distribution that the circuit keeps, in addition to `always_kept` entries that
        are never ablated.
        """
        return loss + self.weight * (self._counted(kept.float()) + always_kept)

    def update(self, smooth: Float[Tensor, "*circuits"], size: Int[Tensor, "*circuits"]) -> None:
        """Set the weight for the next step; called once after every optimiser step.

        `size` is the size of the discrete circuit, entries that are never ablated included; `smooth` is the
        `smooth_size` of the others.
        """

    def forward(self, probabilities: Float[Tensor, "*circuits entry"]) -> Float[Tensor, "*circuits"]:
        """The penalty in nats, with gradients to the keep-probabilities."""
        size = self._counted(probabilities)
        return self.weight * (size if self.regulariser is None else size + self.regulariser(probabilities))

    def _counted(self, entries: Float[Tensor, "*circuits entry"]) -> Float[Tensor, "*circuits"]:
        return entries.sum(dim=-1) if self.relative is None else entries @ self.relative.to(entries.dtype)


class TargetSize(SizePenalty):
    """A weight adjusted to reach a circuit of a given size: a Lagrange multiplier, set by a controller.

    The goal falls linearly from all entries to the target in the first `warmup` optimiser steps and stays there.
    With all sizes counted without the entries that are never ablated, the weight of a kept entry is

        weight * exp(rate * sum over the steps so far of log(kept / goal)) * (smooth / goal) ^ PROPORTIONAL_POWER

    where `kept` is the size of the discrete circuit and `smooth` the `smooth_size`, which changes before entries cross
    the threshold. The weight rises while masks are too large and falls while they are too small. The sum is stationary
    when the discrete circuit has the right size, whatever the total of the entries that are nearly off. Only ratios of
    sizes and of weights enter, so one rule serves any number of entries and any scale of the loss, and the weight is
    always positive.

    Args:
        target: entries to keep, those that are never ablated included; for all circuits, or a list with one for each.
        n_entries: number of entries of the distribution.
        weight: initial weight of a kept entry in nats; more than 0, because it changes by factors.
        warmup: optimiser steps in which the goal falls to the target, at least 1.
        rate: change of the weight's logarithm in one step at a size of e times the goal. The masks' learning rate is
            a good choice: the weight then changes no faster than the logits that respond to it.
        always_kept: number of entries that are never ablated and so are not in the distribution.
        regulariser: see `SizePenalty`.
        relative: see `SizePenalty`.

    Attributes:
        log_weight: buffer; log of the weight without its proportional factor.
        excess: buffer; log(smooth / goal) after the latest step.
        steps: buffer; optimiser steps so far.

    Raises:
        ConfigurationError: the target cannot be reached, or another argument is out of its range.
    """

    def __init__(
        self,
        target: float | Sequence[float],
        n_entries: int,
        *,
        weight: float | Sequence[float],
        warmup: int,
        rate: float = 0.05,
        always_kept: int = 0,
        regulariser: NodeRegulariser | None = None,
        relative: Float[Tensor, " entry"] | None = None,
    ) -> None:
        super().__init__(weight, regulariser, relative)
        if 0 in _as_list(weight):
            raise ConfigurationError(
                "penalty_weight is 0; with target_size it is the price in nats at which the controller starts, and it "
                "changes by factors: expected more than 0, for instance 0.05."
            )
        if not all(always_kept < value <= always_kept + n_entries for value in _as_list(target)):
            raise ConfigurationError(
                f"target_size is {target}; expected more than {always_kept} and at most {always_kept + n_entries}. It "
                f"counts the whole circuit: the {n_entries} parts that may be ablated, and the {always_kept} that are "
                "always kept because `components` does not select them."
            )
        check_at_least(1, target_warmup=warmup)
        starts, targets = torch.broadcast_tensors(self.initial_weight, torch.tensor(target).float())
        self.target = nn.Buffer(targets.clone(), persistent=False)
        self.n_entries, self.warmup, self.rate, self.always_kept = n_entries, warmup, rate, always_kept
        self.log_weight = nn.Buffer(starts.log())
        self.excess = nn.Buffer(torch.zeros_like(starts))
        self.steps = nn.Buffer(torch.tensor(0))

    @property
    def weight(self) -> Float[Tensor, "*circuits"]:
        """The current penalty weight in nats."""
        return (self.log_weight + PROPORTIONAL_POWER * self.excess).exp()

    @torch.no_grad()
    def update(self, smooth: Float[Tensor, "*circuits"], size: Int[Tensor, "*circuits"]) -> None:
        """Raise the weight while the masks are larger than the goal, lower it while they are smaller."""
        self.steps.add_(1)
        done = (self.steps / self.warmup).clamp(max=1.0)
        goal = self.n_entries + done * (self.target - self.always_kept - self.n_entries)
        self.log_weight.add_(self.rate * _log_ratio(size - self.always_kept, goal))
        self.excess.copy_(_log_ratio(smooth, goal))

    def objective(
        self, loss: Float[Tensor, "*circuits"], kept: Bool[Tensor, "*circuits entry"], always_kept: int
    ) -> Float[Tensor, "*circuits"]:
        """The loss alone, because the discrete circuit has the target size."""
        return loss


@torch.no_grad()
def smooth_size(probabilities: Float[Tensor, "*circuits entry"], threshold: float) -> Float[Tensor, "*circuits"]:
    """Smooth number of keep-probabilities above the threshold, which changes before one of them crosses it.

    An entry counts by the fourth power of its odds relative to the threshold's. The expected size would also count the
    many entries that are nearly off, so a weight that brings it to a target makes the circuit smaller than the target.
    """
    odds = probabilities.float().clamp(1e-6, 1 - 1e-6).logit() - math.log(threshold / (1 - threshold))
    return torch.sigmoid(SHARPNESS * odds).sum(dim=-1)


def _log_ratio(size: Tensor, goal: Tensor) -> Tensor:
    return (size / goal).log().clamp(-LARGEST_ERROR, LARGEST_ERROR)


def _as_list(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, Sequence) else [value]
