"""Models whose circuits are known, with their tasks, for the tests."""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from oa_train.ablations.base import Ablation
from oa_train.interventions.evaluation import Behaviour, circuit_behaviour
from oa_train.interventions.kinds import KINDS, AblationKind, AblationSource
from oa_train.models.graph import Graph
from oa_train.models.known.model import KnownModel
from oa_train.models.loading import CausalLM, LMSpec, load_model
from oa_train.tasks import Task
from oa_train.training.known import KNOWN_TASKS, write_known


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

    def ablation(self, kind: AblationKind) -> Ablation:
        return KINDS[kind].prepare(AblationSource(self.model, self.task))

    def kl(self, masks: torch.Tensor, kind: AblationKind, n_prompts: int = 64) -> torch.Tensor:
        """Divergence of circuits of edges, averaged over prompts."""
        return self.behaviour(masks, [self.ablation(kind)], n_prompts).kl.mean(dim=1)

    def behaviour(self, masks: torch.Tensor, ablations: list[Any], n_prompts: int = 64) -> Behaviour:
        return circuit_behaviour(self.model, self.task.batches("test", n_prompts), masks, ablations)

    def without_source(self, *sources: str) -> torch.Tensor:
        """All edges but those out of some sources."""
        numbers = torch.tensor([self.graph.sources.index(one) for one in sources])
        return ~torch.isin(self.graph.edge_sources, numbers)


@cache
def known_case(name: str, seed: int = 0) -> Case:
    """Write a known model and read it back; once for all tests of a process."""
    with tempfile.TemporaryDirectory() as folder:
        known = write_known(name, Path(folder), seed)
        lm = LMSpec(folder)
        task = KNOWN_TASKS[name](lm=lm, n_means=256, n_validation=64, n_test=64)
        return Case(known, load_model(lm), task)
