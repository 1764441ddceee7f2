"""The ablations by name: what each replaces components with, and how it is prepared for a model and a task.

To add a kind of ablation, write an `Ablation` and add its name and one entry to `KINDS` here; figures take its colour
from `figures.style`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.ablations.noise import NoiseAblation
from oa_train.ablations.prompts import OtherPromptAblation
from oa_train.ablations.means import StreamingMeans
from oa_train.batches import Batch
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.engine.reading import source_means
from oa_train.models.families import Dimensions
from oa_train.models.loading import CausalLM
from oa_train.progress import Track, silent
from oa_train.shapes import Tensor
from oa_train.tasks.task import Task
from oa_train.tasks.donors import Donors

AblationKind = Literal["optimal", "mean", "zero", "resample", "noise", "counterfactual_mean", "counterfactual"]


class AblationSource:
    """What ablations are made from: statistics of a model on a task's `means` prompts, gathered when they are needed.

    Args:
        model: frozen causal language model.
        task: where prompts come from.
        n_positions: size of the tables of constants; 1 pools all positions.
        track: progress.
    """

    def __init__(self, model: CausalLM, task: Task, n_positions: int = 1, track: Track = silent) -> None:
        self.model = model
        self.task = task
        self.n_positions = n_positions
        self._track = track

    @cached_property
    def mean(self) -> Constants:
        """Mean values on the prompts."""
        return self._sums.table(self.n_positions)

    @cached_property
    def counterfactual_mean(self) -> Constants:
        """Mean values on the counterfactual prompts."""
        sums = self.statistics(Batch.counterfactual, "averaging activations on counterfactuals")
        return sums.table(self.n_positions)

    @cached_property
    def spread(self) -> Constants:
        """Standard deviation of the values in each dimension."""
        squares = self.statistics(lambda batch: batch, "measuring the spread of activations", torch.square)
        return self._sums.spread(squares, self.n_positions)

    @cached_property
    def _sums(self) -> StreamingMeans:
        return self.statistics(lambda batch: batch, "averaging activations")

    @property
    def zero(self) -> Constants:
        """Zeros."""
        return Constants.zeros(Dimensions.of(self.model.config), self.task.bos_token_id, self.n_positions)

    def statistics(
        self,
        prompts: Callable[[Batch], Batch],
        description: str,
        of: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> StreamingMeans:
        """Sums over the prompts of the stream `means`.

        Args:
            prompts: changes each batch before it is run.
            description: what the progress bar says.
            of: applied to the values, in float64, before they are summed.
        """
        batches = list(self.task.batches("means", self.task.n_means))
        shown = (prompts(batch) for batch in self._track(batches, description))
        return source_means(self.model, shown, self.task.bos_token_id, of)


@dataclass(frozen=True)
class Kind:
    """A kind of ablation.

    Attributes:
        name: as configurations and results have it.
        prepare: makes the ablation, or what its training starts from, for a model and a task.
        constant: whether it replaces by the same values on every prompt, so that they can be stored.
        learned: whether its constants are trained from there on.
        total: whether what it passes on carries nothing about the prompt.
        paired: whether it needs the counterfactuals of a task's prompts.
    """

    name: AblationKind
    prepare: Callable[[AblationSource], Ablation]
    constant: bool = True
    learned: bool = False
    total: bool = True
    paired: bool = False


def _resample(source: AblationSource) -> Ablation:
    return OtherPromptAblation(Donors(source.task, source.task.seed), source.task.bos_token_id)


def _counterfactual(source: AblationSource) -> Ablation:
    return OtherPromptAblation(Batch.counterfactual, source.task.bos_token_id)


def _noise(source: AblationSource) -> Ablation:
    return NoiseAblation(source.mean, source.spread, source.task.seed)


KINDS: dict[AblationKind, Kind] = {
    kind.name: kind
    for kind in (
        Kind("optimal", lambda source: source.mean, learned=True),
        Kind("mean", lambda source: source.mean),
        Kind("zero", lambda source: source.zero),
        Kind("resample", _resample, constant=False),
        Kind("noise", _noise, constant=False),
        Kind("counterfactual_mean", lambda source: source.counterfactual_mean, paired=True),
        Kind("counterfactual", _counterfactual, constant=False, total=False, paired=True),
    )
}


def check_kind(option: str, name: str) -> Kind:
    """Look a kind of ablation up.

    Raises:
        ConfigurationError: there is none of that name.
    """
    if name not in KINDS:
        raise ConfigurationError(f"{option} is {name!r}. {nearest_names(name, KINDS)}")
    return KINDS[name]
