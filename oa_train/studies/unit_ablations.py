"""Sets of units ablated under several kinds of ablation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import KINDS, AblationKind, AblationSource
from oa_train.metrics.measures import MEASURES
from oa_train.models.levels import Level
from oa_train.shapes import Bool, Tensor
from oa_train.studies.options import n_positions
from oa_train.studies.pieces import Piece
from oa_train.studies.study import Study, spoken


@dataclass(frozen=True, eq=False)
class UnitAblations:
    """The ablations of a study, for any sets of units.

    Attributes:
        study: supplies model, prompts and progress.
        level: level of the units.
        kinds: kinds of ablation.
        fit: training of constants, for kinds that are learned.
        positions: positions that constants tell apart; `every` is as many as the test prompts have.
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
        """Ablations by kind; of a learned one, the initial constants."""
        return {kind: KINDS[kind].prepare(self.source) for kind in self.kinds}

    def measured(self, masks: Bool[Tensor, "circuit entry"], described: str) -> Piece:
        """Measures of circuits under each kind, as tensors `<kind>.<measure>` of [circuit, prompt]."""
        assert self.prepared  # gathered before all stages that use them
        piece: Piece = {}
        for kind in self.kinds:
            ablations = self._fitted(masks, described) if KINDS[kind].learned else [self.prepared[kind]]
            shown = f"{described} under {spoken(kind)} ablation"
            behaviour = self.study.behaviour(self.level, masks, ablations, shown, self.fit.rows_per_run)
            piece |= {f"{kind}.{measure}": getattr(behaviour, measure) for measure in MEASURES}
        return piece

    def _fitted(self, masks: Tensor, described: str) -> Sequence[Ablation]:
        source = self.source
        return fit_constants(
            self.study.model,
            self.study.task,
            self.level,
            masks,
            [source.mean],
            self.fit,
            others=[source.mean, source.zero],
            track=self.study.track,
            description=f"fitting constants of {described}",
        ).sets


def gathered(pieces: Sequence[Mapping[str, Tensor]], kind: AblationKind, clean: Behaviour) -> Behaviour:
    """Behaviour under a kind of ablation, from the pieces of `UnitAblations.measured`."""
    measures = {name: torch.cat([piece[f"{kind}.{name}"] for piece in pieces]) for name in MEASURES}
    return Behaviour(**measures, identities=clean.identities)
