"""Effects of ablating sets of units under several kinds of ablation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import RefitSettings, fit_passes
from oa_train.ablations.registry import KINDS, AblationKind, AblationSource
from oa_train.metrics.measures import MEASURES
from oa_train.models.levels import Level
from oa_train.progress import Stage
from oa_train.shapes import Bool, Tensor
from oa_train.studies.findings import plain
from oa_train.studies.fitted import fitted_constants
from oa_train.studies.options import n_positions
from oa_train.studies.pieces import Piece, Pieces
from oa_train.studies.study import Study, spoken, statistics_stages


@dataclass(frozen=True, eq=False)
class UnitAblations:
    """Ablates sets of units for a study, under each of its kinds of ablation.

    Attributes:
        study: the study, which supplies model, prompts and progress.
        level: level of the units.
        kinds: kinds of ablation.
        fit: training of the constants of learned kinds.
        positions: number of positions with their own constants; `every` is as many as the test prompts have.
    """

    study: Study[Any]
    level: Level
    kinds: Sequence[AblationKind]
    fit: RefitSettings
    positions: int | Literal["every"] = 1

    @cached_property
    def source(self) -> AblationSource:
        """Statistics from which the ablations are made."""
        study, positions = self.study, n_positions(self.positions, self.study.batches)
        return AblationSource(study.model, study.task, self.level, positions, study.track)

    @cached_property
    def prepared(self) -> dict[AblationKind, Ablation]:
        """Ablations by kind; for a learned one, its initial constants."""
        return {kind: KINDS[kind].prepare(self.source) for kind in self.kinds}

    def pieces(self, units: Sequence[str]) -> Pieces:
        """Measured pieces, stored in the study's folder if it has one; `units` are those that the study ablates."""
        study, task = self.study, self.study.task
        about = {
            "settings": plain({**asdict(study.settings), "dictionaries": None}),  # the level identifies them
            "units": list(units),
            "level": self.level.header(),
            "ablations": list(self.kinds),
            "task": task.describe() | {"n_test": task.n_test, "n_means": task.n_means},
            "fingerprint": study.fingerprint,
        }
        return Pieces(study.folder, about)

    def stages(self, sizes: Sequence[int]) -> list[Stage]:
        """The statistics, then constants and test prompts for pieces of these sizes under each kind."""
        task = self.study.task
        stages = statistics_stages(self.kinds, task) if sizes else []
        for size in sizes:
            for kind in self.kinds:
                if KINDS[kind].learned:
                    stages.append(Stage("constants", fit_passes(size, self.fit, task.n_validation, 1)))
                stages.append(Stage("the test prompts", size * task.n_test))
        return stages

    def measured(self, masks: Bool[Tensor, "circuit entry"], described: str) -> Piece:
        """Measures of circuits under each kind, as tensors `<kind>.<measure>` of shape [circuit, prompt]."""
        assert self.prepared  # the statistics are gathered before the stages that use them
        piece: Piece = {}
        for kind in self.kinds:
            ablations: Sequence[Ablation] = [self.prepared[kind]]
            if KINDS[kind].learned:
                ablations = fitted_constants(self.source, masks, self.fit, f"fitting constants of {described}")
            shown = f"{described} under {spoken(kind)} ablation"
            behaviour = self.study.behaviour(self.level, masks, ablations, shown, self.fit.rows_per_run)
            piece |= {f"{kind}.{measure}": getattr(behaviour, measure) for measure in MEASURES}
        return piece


def gathered(pieces: Sequence[Mapping[str, Tensor]], kind: AblationKind, clean: Behaviour) -> Behaviour:
    """Behaviour under a kind of ablation, concatenated from the pieces of `UnitAblations.measured`."""
    measures = {name: torch.cat([piece[f"{kind}.{name}"] for piece in pieces]) for name in MEASURES}
    return Behaviour(**measures, identities=clean.identities)
