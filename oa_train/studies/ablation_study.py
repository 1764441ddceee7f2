"""Studies that compare kinds of ablation: how the kinds are chosen, prepared and run."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import ABLATION_KINDS, AblationName, AblationSource, check_suits
from oa_train.models.levels import Level
from oa_train.progress import Stage
from oa_train.shapes import Bool, Tensor
from oa_train.studies.study import S, Study, spoken


class AblationStudy(Study[S]):
    """A study that ablates entries of a level. Subclasses set `level` in `check`, and the kinds by `choose_kinds`.

    Attributes:
        level: level of the masks.
        kinds: kinds of ablation.
        left_out: the reason for each kind that is left out by default.
    """

    level: Level
    kinds: list[AblationName]
    left_out: dict[AblationName, str]

    @property
    def positions(self) -> int:
        """Number of positions with their own constants; by default that of the first circuit."""
        return self.circuits[0].positions if self.circuits else 1

    def choose_kinds(self, requested: list[AblationName] | None) -> None:
        """Set `kinds` to those requested, or by default to all that ablate anything and that the prompts allow.

        Raises:
            TaskError: the prompts do not allow a requested kind.
        """
        source = AblationSource(self.model, self.task, self.level)
        if requested is not None:
            check_suits(requested, source, self.batches)
            self.kinds, self.left_out = requested, {}
            return
        reasons = {name: kind.why_not(source, self.batches) for name, kind in ABLATION_KINDS.items()}
        self.left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        self.kinds = [name for name, kind in ABLATION_KINDS.items() if not kind.restores and name not in self.left_out]

    def left_out_lines(self) -> Iterator[str]:
        """Sentences about the kinds that are left out."""
        for reason in dict.fromkeys(self.left_out.values()):
            kinds = [spoken(kind) for kind, other in self.left_out.items() if other == reason]
            yield f"Left out: {' and '.join(kinds)} ablation, because {reason}."

    @cached_property
    def source(self) -> AblationSource:
        """Statistics from which ablations are made."""
        return AblationSource(self.model, self.task, self.level, self.positions, self.track)

    @cached_property
    def prepared(self) -> dict[AblationName, Ablation]:
        """Ablations by kind; for a learned one, its initial constants."""
        return {kind: ABLATION_KINDS[kind].prepare(self.source) for kind in self.kinds}

    def fitted_constants(
        self,
        masks: Bool[Tensor, "circuit entry"],
        fit: RefitSettings,
        description: str,
        *,
        starts: Sequence[Constants] | None = None,
        level: Level | None = None,
    ) -> list[Constants]:
        """Train optimal constants for each circuit; on the validation prompts they are no worse than means and zeros.

        Args:
            masks: a circuit in each row.
            fit: settings of the training.
            description: name of the circuits, for the progress bar.
            starts: initial constants of each circuit, or one set for all; by default the means.
            level: level of the masks, if it differs from that of the study.
        """
        if not len(masks):
            return []
        mean, zero = self.source.mean, self.source.zero
        return fit_constants(
            self.model,
            self.task,
            level or self.level,
            masks,
            starts or [mean],
            fit,
            others=[mean, zero],
            track=self.track,
            description=f"fitting constants of {description}",
        ).sets

    def under_each(
        self,
        masks: Bool[Tensor, "circuit entry"],
        constants: Callable[[], Sequence[Ablation]],
        description: str,
        rows_per_run: int,
        level: Level | None = None,
    ) -> dict[AblationName, Behaviour]:
        """Behaviour of circuits on the test prompts under each kind.

        Args:
            masks: a circuit in each row.
            constants: trains constants for the circuits; called for a learned kind.
            description: name of the circuits, for the progress bar.
            rows_per_run: see `circuit_behaviour`.
            level: level of the masks, if it differs from that of the study.
        """
        prepared, behaviours = self.prepared, {}  # the statistics are gathered before the stages that use them
        for kind in self.kinds:
            ablations = constants() if ABLATION_KINDS[kind].learned else [prepared[kind]]
            described = f"{description} under {spoken(kind)} ablation"
            behaviours[kind] = self.behaviour(level or self.level, masks, ablations, described, rows_per_run)
        return behaviours

    def stages_under_each(self, n_circuits: int, fit_passes: int) -> list[Stage]:
        """Stages of `under_each`; `fit_passes` is the number of passes in training constants, and may be 0."""
        stages = []
        for kind in self.kinds:
            if ABLATION_KINDS[kind].learned and fit_passes:
                stages.append(Stage("constants", fit_passes))
            stages.append(Stage("the test prompts", n_circuits * self.task.n_test))
        return stages
