"""The edges that a known model needs under a kind of ablation, computed rather than assumed.

A hand-written list of edges says how a model was meant to work. Which edges can be cut depends on their replacements:
another prompt of the same length reveals a position as well as the prompt itself, zeros remove constants on which the
model relies, and trained constants restore them. So for every kind of ablation a search finds the smallest sets of
edges that preserve the model's predictions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import AblationName, AblationSource, check_kind
from oa_train.checks import check_at_least, check_positive
from oa_train.metrics.ground_truth import Recovery, recovery
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.progress import Track, silent
from oa_train.seeds import torch_generator
from oa_train.shapes import Bool, Float, Tensor
from oa_train.tasks.task import Task

# Number of sets of one size that the search follows further; if more are enough, those with the lowest divergence.
MOST_SETS = 128


# Maps circuits [circuit, edge] to their divergence from the model, in nats.
Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TruthSettings:
    """Settings of the search for the edges that are needed.

    Attributes:
        tolerance: KL divergence from the model, in nats, up to which a set of edges is enough.
        n_prompts: number of test prompts on which it is measured.
        fit: training of the constants of every set, for the kind `optimal`.
        n_starts: number of starts of that training: the mean, then random ones around it. The best is kept, so that no
            set is rejected because of a bad start.
        n_orders: number of orders in which edges are removed if the search starts from all edges: the first by the
            cost of each edge, the others random.
    """

    tolerance: float = 0.05
    n_prompts: int = 256
    fit: RefitSettings = field(
        default_factory=lambda: RefitSettings(steps=300, batch_size=16, learning_rate=0.01, evaluate_every=50)
    )
    n_starts: int = 2
    n_orders: int = 2

    def __post_init__(self) -> None:
        check_positive(tolerance=self.tolerance)
        check_at_least(1, n_prompts=self.n_prompts, n_starts=self.n_starts, n_orders=self.n_orders)


@dataclass(frozen=True, eq=False)
class Truth:
    """The smallest sets of edges that are enough under a kind of ablation.

    Attributes:
        kind: kind of ablation.
        graph: graph of the model.
        sets: the sets, each with its edges in mask order; all have the same size.
        kl: divergence of each set from the model, in nats.
        without: divergence of each set without one of its edges, in nats, by edge; all are above the tolerance.
        meant_kl: divergence of the edges by which the model was meant to work.
    """

    kind: AblationName
    graph: Graph
    sets: tuple[tuple[str, ...], ...]
    kl: tuple[float, ...]
    without: tuple[dict[str, float], ...]
    meant_kl: float

    @property
    def necessary(self) -> tuple[str, ...]:
        """Edges that are in every set."""
        return tuple(edge for edge in self.sets[0] if all(edge in edges for edges in self.sets[1:]))

    @property
    def margin(self) -> float:
        """Smallest divergence of a set without one of its edges, in nats."""
        return min(min(costs.values()) for costs in self.without)

    def recovery(self, circuit: Bool[Tensor, " edge"], scores: Float[Tensor, " edge"] | None = None) -> Recovery:
        """Compare a circuit, and the scores of all edges, with the set that it agrees with best."""
        recoveries = [recovery(circuit, self.graph.mask(edges), scores) for edges in self.sets]
        return max(recoveries, key=lambda result: (result.f1, result.auroc or 0.0))

    def as_json(self) -> dict[str, Any]:
        """The sets and their divergences, as plain data."""
        return {
            "kind": self.kind,
            "sets": [list(edges) for edges in self.sets],
            "kl": list(self.kl),
            "without": list(self.without),
            "meant_kl": self.meant_kl,
        }


def find_truth(
    model: CausalLM,
    task: Task,
    meant: Sequence[str],
    kind: AblationName,
    settings: TruthSettings | None = None,
    track: Track = silent,
) -> Truth:
    """Find the smallest sets of edges that are enough.

    The search starts from the intended edges if they are enough; otherwise from those that remain when as many of all
    edges as possible have been removed in some order. From there, edges are removed one by one in every order as long
    as the remaining ones are enough. So every smaller set is found that can be reached through sets that are enough,
    up to the limit `MOST_SETS`. Edges that no longer lie on a path from the input to the logits are removed as well.

    Args:
        model: frozen causal language model.
        task: the task that it solves.
        meant: names of the edges with which it was meant to solve it.
        kind: kind of ablation.
        settings: tolerance, prompts, training.
        track: progress.
    """
    settings = settings or TruthSettings()
    graph = Graph.of(model.config)
    measure = _Measure(model, task, kind, settings, track)
    starts = graph.mask(meant).unsqueeze(0)
    meant_kl = float(measure(starts))
    if meant_kl > settings.tolerance:
        starts = torch.stack([_reduced(graph, measure, settings, order) for order in range(settings.n_orders)])
    return _smallest(graph, measure, _minimal(graph, measure, starts, settings.tolerance), kind, meant_kl)


class _Measure:
    """KL divergence of circuits on test prompts, in nats."""

    def __init__(self, model: CausalLM, task: Task, kind: AblationName, settings: TruthSettings, track: Track) -> None:
        self._model, self._task, self._settings, self._track = model, task, settings, track
        self._kind = check_kind("kind", kind)
        self._graph = Graph.of(model.config)
        self._source = AblationSource(model, task, self._graph, track=track)
        self._batches = list(task.batches("test", settings.n_prompts))

    def __call__(self, masks: Bool[Tensor, "circuit edge"]) -> Float[Tensor, " circuit"]:
        kl = self._under([self._kind.prepare(self._source)], masks)
        # Constants need no training if those from which training would start are enough.
        wanting = kl > self._settings.tolerance
        if self._kind.learned and wanting.any():
            kl[wanting] = self._under(self._fitted(masks[wanting]), masks[wanting])
        return kl

    def _under(self, ablations: Sequence[Ablation], masks: Tensor) -> Tensor:
        return circuit_behaviour(self._model, self._batches, self._graph, masks, ablations).kl.mean(dim=1)

    def _fitted(self, masks: Tensor) -> list[Constants]:
        """For each circuit, the constants that did best on validation prompts, over all starts."""
        fits = [
            fit_constants(
                self._model,
                self._task,
                self._graph,
                masks,
                [start] * len(masks),
                self._settings.fit,
                others=[self._source.mean, self._source.zero],
                track=self._track,
            )
            for start in self._starts()
        ]
        best = torch.stack([fit.validation_loss for fit in fits]).argmin(dim=0).tolist()
        return [fits[start].sets[circuit] for circuit, start in enumerate(best)]

    def _starts(self) -> list[Constants]:
        mean, spread = self._source.mean, self._source.spread
        starts = [mean]
        for number in range(1, self._settings.n_starts):
            generator = torch_generator(self._task.seed, "start of constants", number)
            tables = {
                site: table + spread.tables[site] * torch.randn(table.shape, generator=generator)
                for site, table in mean.tables.items()
            }
            starts.append(Constants(tables, mean.slots))
        return starts


def _reduced(graph: Graph, measure: Measure, settings: TruthSettings, order: int) -> Bool[Tensor, " edge"]:
    """Remove edges from the whole model, many at a time, until none can be removed by itself.

    In each round the edges that can be removed alone are ordered, and the first ones are removed together: all of
    them, or half, or a quarter, and so on, the most that leave enough.
    """
    kept = torch.ones(graph.n_edges, dtype=torch.bool)
    generator = torch_generator("order of edges", order)
    while True:
        edges = kept.nonzero().flatten()
        alone = graph.prune(_each_without(kept))
        costs = measure(alone)
        able = (costs <= settings.tolerance).nonzero().flatten()
        if not len(able):
            return kept
        ordered = able[costs[able].argsort()] if order == 0 else able[torch.randperm(len(able), generator=generator)]
        counts = [len(able) >> halvings for halvings in range(len(able).bit_length())]
        fewer = kept.repeat(len(counts), 1)
        for row, count in enumerate(counts):
            fewer[row, edges[ordered[:count]]] = False
        fewer = graph.prune(fewer)
        enough = (measure(fewer) <= settings.tolerance).nonzero().flatten()
        kept = fewer[enough[0]]


def _each_without(kept: Bool[Tensor, " edge"]) -> Bool[Tensor, "circuit edge"]:
    """Copies of a circuit, each without one of its edges."""
    edges = kept.nonzero().flatten()
    masks = kept.repeat(len(edges), 1)
    masks[torch.arange(len(edges)), edges] = False
    return masks


def _minimal(
    graph: Graph, measure: Measure, starts: Bool[Tensor, "circuit edge"], tolerance: float
) -> list[tuple[Tensor, dict[str, float]]]:
    """Subsets of the starts from which no edge can be removed, and the cost of removing each of their edges."""
    level, minimal = starts.unique(dim=0), []
    while len(level):
        children = [graph.prune(_each_without(edges)) for edges in level]
        distinct, which = torch.cat(children).unique(dim=0, return_inverse=True)
        kl = measure(distinct)
        costs = kl[which].split([len(masks) for masks in children])
        minimal += [
            (edges, dict(zip(graph.kept(edges), cost.tolist(), strict=True)))
            for edges, cost in zip(level, costs, strict=True)
            if (cost > tolerance).all()
        ]
        enough = kl <= tolerance
        level = distinct[enough][kl[enough].argsort()[:MOST_SETS]]
    return minimal


def _smallest(
    graph: Graph, measure: Measure, minimal: list[tuple[Tensor, dict[str, float]]], kind: AblationName, meant_kl: float
) -> Truth:
    size = min(len(costs) for _, costs in minimal)
    unique = {tuple(costs): (mask, costs) for mask, costs in minimal if len(costs) == size}
    kl = measure(torch.stack([mask for mask, _ in unique.values()]))
    return Truth(
        kind=kind,
        graph=graph,
        sets=tuple(unique),
        kl=tuple(kl.tolist()),
        without=tuple(costs for _, costs in unique.values()),
        meant_kl=meant_kl,
    )
