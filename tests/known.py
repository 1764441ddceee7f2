"""Models whose circuits are known, with their tasks, for the tests."""

import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.registry import ABLATION_KINDS, AblationName, AblationSource
from oa_train.batches import Batch
from oa_train.engine.reading import read_values
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec
from oa_train.tasks import Task
from oa_train.zoo.known import KNOWN_TASKS, KnownModel, write_known


@dataclass(frozen=True, eq=False)
class Case:
    """A known model as everyone else gets it: read from a folder, with its task.

    Attributes:
        known: as it was built.
        model: as it was read.
        task: that it solves.
    """

    known: KnownModel
    model: CausalLM
    task: Task

    @property
    def graph(self) -> Graph:
        return Graph.of(self.model.config)

    @cached_property
    def batch(self) -> Batch:
        """Some prompts."""
        return self.task.batch("test", 0, 32)

    @cached_property
    def ablations(self) -> dict[AblationName, Ablation]:
        """An ablation of every kind, the starts of those that are trained."""
        source = AblationSource(self.model, self.task, self.graph)
        return {name: kind.prepare(source) for name, kind in ABLATION_KINDS.items()}

    def kl(self, masks: torch.Tensor, kind: AblationName) -> torch.Tensor:
        """Divergence of circuits of edges, averaged over prompts."""
        return circuit_behaviour(self.model, [self.batch], self.graph, masks, [self.ablations[kind]]).kl.mean(dim=1)

    def heads(self) -> torch.Tensor:
        """Values of all heads on prompts of the commonest length, [layer, prompt, position, head, d_head]."""
        batch = self.batch
        lengths = batch.lengths
        kept = (lengths == lengths.mode().values).nonzero().flatten()
        values = read_values(self.model, batch, self.graph)
        heads = torch.stack([values[Site("heads", layer)][kept] for layer in range(self.graph.n_layers)])
        return heads[:, :, : int(lengths.mode().values)]

    def without_source(self, *sources: str) -> torch.Tensor:
        """All edges but those out of some sources."""
        numbers = torch.tensor([self.graph.sources.index(source) for source in sources])
        return ~torch.isin(self.graph.edge_sources, numbers)


@cache
def known_case(name: str, seed: int = 0) -> Case:
    """Write a known model and read it back; once for all tests of a process."""
    with tempfile.TemporaryDirectory() as folder:
        known = write_known(name, Path(folder), seed)
        lm = LMSpec(folder)
        task = KNOWN_TASKS[name](lm=lm, n_means=128, n_validation=64, n_test=64)
        return Case(known, load_model(lm), task)
