"""Kinds of ablation by name, and their preparation for a model and a task.

To add an ablation, write a subclass of `Ablation` and enter it in `ABLATION_KINDS`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants, Slots
from oa_train.ablations.means import StreamingMeans, value_sums
from oa_train.ablations.noise import NoiseAblation
from oa_train.ablations.prompts import OtherPromptAblation, OtherPrompts
from oa_train.batches import Batch
from oa_train.checks import check_choice
from oa_train.errors import ConfigurationError, TaskError
from oa_train.models.frozen import CausalLM
from oa_train.models.levels import Level
from oa_train.progress import Track, counted, silent
from oa_train.shapes import Tensor
from oa_train.tasks.partners import Partners
from oa_train.tasks.task import Task

# A key of `ABLATION_KINDS`; not a Literal, so that users can register their own ablations.
AblationName = str

# Statistics of an `AblationSource` by attribute, with what gathering each is called; a kind names those that it needs.
STATISTICS = {
    "mean": "averaging activations",
    "mean_by_position": "averaging activations by position",
    "spread": "measuring the spread of activations",
    "counterfactual_mean": "averaging activations on counterfactuals",
}


class AblationSource:
    """Statistics of a model on a task's `means` stream from which ablations are made, computed when first needed.

    `positions` is the number of positions that constants distinguish; 1 pools them.
    """

    def __init__(self, model: CausalLM, task: Task, level: Level, positions: int = 1, track: Track = silent) -> None:
        self.model, self.task, self.level, self.track = model, task, level, track
        self.slots = Slots(positions, level.spans)

    @cached_property
    def partners(self) -> Partners:
        """Source of partners of prompts, with spans of the same lengths."""
        return Partners(self.task, self.task.seed, [span for span in self.level.spans if span is not None])

    @cached_property
    def mean(self) -> Constants:
        """Mean values on the prompts."""
        return self._sums.means()

    @cached_property
    def mean_by_position(self) -> Constants:
        """Mean values at each position of the prompts."""
        if self.slots.positions > 1:
            return self.mean
        longest = max(int(batch.lengths.max()) for batch in self.task.batches("means", self.task.n_means))
        slots = Slots(longest, self.level.spans)
        return self.sums(lambda batch: batch, STATISTICS["mean_by_position"], slots=slots).means()

    @cached_property
    def counterfactual_mean(self) -> Constants:
        """Mean values on the counterfactual prompts."""
        return self.sums(Batch.counterfactual, STATISTICS["counterfactual_mean"]).means()

    @cached_property
    def spread(self) -> Constants:
        """Standard deviation of the values in each dimension."""
        squares = self.sums(lambda batch: batch, STATISTICS["spread"], torch.square)
        return self._sums.spread(squares)

    @cached_property
    def _sums(self) -> StreamingMeans:
        return self.sums(lambda batch: batch, STATISTICS["mean"])

    @property
    def zero(self) -> Constants:
        """Zeros."""
        return Constants.zeros(self.level, self.slots.positions)

    def sums(
        self,
        prompts: Callable[[Batch], Batch],
        description: str,
        of: Callable[[Tensor], Tensor] = lambda value: value,
        slots: Slots | None = None,
    ) -> StreamingMeans:
        """Sums of a function `of` the values on the `means` stream, each of whose batches `prompts` maps first."""
        batches = list(self.task.batches("means", self.task.n_means))
        shown = (prompts(batch) for batch in counted(self.track, batches, description))
        return value_sums(self.model, shown, self.level, slots or self.slots, of)


@dataclass(frozen=True)
class AblationKind:
    """A kind of ablation.

    Attributes:
        name: name in configurations and results.
        prepare: makes the ablation for a model and a task; for a learned ablation, the initial constants.
        statistics: keys of `STATISTICS` that `prepare` takes from the source, by which work is announced.
        constant: True if replacements are constants of `positions` slots, which runs store.
        learned: True if the constants are trained.
        total: True if replacements carry nothing about the prompt.
        paired: True if the task's prompts need counterfactuals.
        partnered: True if the prompts need partners (see `Partners`).
        restores: True if replacements are the model's own clean values, which change nothing by themselves.
    """

    name: AblationName
    prepare: Callable[[AblationSource], Ablation]
    statistics: tuple[str, ...] = ()
    constant: bool = True
    learned: bool = False
    total: bool = True
    paired: bool = False
    partnered: bool = False
    restores: bool = False

    def why_not(self, source: AblationSource, batches: Iterable[Batch]) -> str | None:
        """Reason why the ablation cannot be applied to these prompts, for messages; None if it can."""
        if self.paired and any(batch.counterfactual_tokens is None for batch in batches):
            return "the prompts have no counterfactuals"
        return source.partners.why_lacking(batches) if self.partnered else None

    def __reduce__(self) -> tuple[Callable[[AblationName], "AblationKind"], tuple[AblationName]]:
        # By name: functions of a kind may be lambdas, and modules are pickled for a spawned process.
        return _kind, (self.name,)


def _kind(name: AblationName) -> AblationKind:
    return ABLATION_KINDS[name]


def _resample(source: AblationSource) -> Ablation:
    return OtherPromptAblation(source.partners, source.level.spans)


def _other_prompt(other_prompts: OtherPrompts) -> Callable[[AblationSource], Ablation]:
    return lambda source: OtherPromptAblation(other_prompts, source.level.spans)


ABLATION_KINDS: dict[AblationName, AblationKind] = {
    kind.name: kind
    for kind in (
        AblationKind("optimal", lambda source: source.mean, ("mean",), learned=True),
        AblationKind("mean", lambda source: source.mean, ("mean",)),
        # Not stored, as the number of positions is known only with the prompts.
        AblationKind(
            "mean_by_position", lambda source: source.mean_by_position, ("mean_by_position",), constant=False
        ),
        AblationKind("zero", lambda source: source.zero),
        AblationKind("resample", _resample, constant=False, partnered=True),
        AblationKind(
            "noise",
            lambda source: NoiseAblation(source.mean, source.spread, source.task.seed),
            ("mean", "spread"),
            constant=False,
        ),
        AblationKind(
            "counterfactual_mean", lambda source: source.counterfactual_mean, ("counterfactual_mean",), paired=True
        ),
        AblationKind("counterfactual", _other_prompt(Batch.counterfactual), constant=False, total=False, paired=True),
        AblationKind("clean", _other_prompt(lambda batch: batch), constant=False, total=False, restores=True),
    )
}


def check_kind(option: str, name: str) -> AblationKind:
    """Look up an ablation; raises `ConfigurationError` if it is unknown or restores the model's own values."""
    ablating = {kind: entry for kind, entry in ABLATION_KINDS.items() if not entry.restores}
    if name in ABLATION_KINDS and name not in ablating:
        raise ConfigurationError(
            f"{option} is {name!r}, which restores the model's own values and so ablates nothing. It is for "
            f"restoring units while others are ablated. Expected one of {', '.join(ablating)}."
        )
    check_choice(option, name, ablating)
    return ablating[name]


def check_suits(kinds: Sequence[AblationName], source: AblationSource, batches: Sequence[Batch]) -> None:
    """Check that the prompts allow these ablations; raises `TaskError` with the reason if not."""
    for name in kinds:
        if reason := ABLATION_KINDS[name].why_not(source, batches):
            total = ", ".join(kind.name for kind in ABLATION_KINDS.values() if kind.total)
            raise TaskError(
                f"The task {source.task.name} has no {name.replace('_', ' ')} ablation: {reason}. Add such prompts, "
                f"or choose another ablation ({total}, say)."
            )
