"""What studies share that ablate units of a selection: their options, and the ablation of any sets of units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import KINDS, AblationKind, AblationSource
from oa_train.errors import ConfigurationError
from oa_train.metrics.measures import MEASURES
from oa_train.models.levels import Level
from oa_train.shapes import Bool, Tensor
from oa_train.studies.pieces import Piece
from oa_train.studies.study import Study, spoken


def check_unit_options(
    parts_at_once: int, positions: int | Literal["every"], threshold: float, false_discovery_rate: float
) -> None:
    """Refuse values of these options that cannot work with a `ConfigurationError`."""
    if parts_at_once < 1:
        raise ConfigurationError(f"parts_at_once is {parts_at_once}; expected at least 1.")
    if isinstance(positions, int) and positions < 1:
        raise ConfigurationError(f"positions is {positions}; expected at least 1, or every.")
    if not threshold >= 0:
        raise ConfigurationError(f"threshold is {threshold}; expected nats, at least 0.")
    if not 0 < false_discovery_rate < 1:
        raise ConfigurationError(f"false_discovery_rate is {false_discovery_rate}; expected a share between 0 and 1.")


@dataclass(frozen=True, eq=False)
class UnitAblations:
    """The ablations of a study, by which it ablates any sets of units.

    Attributes:
        study: gives model, prompts and progress.
        level: of the units.
        kinds: kinds of ablation.
        fit: training of constants, for kinds that are learned.
        positions: size of the tables of constants; `every` distinguishes all positions of the test prompts.
    """

    study: Study[Any]
    level: Level
    kinds: Sequence[AblationKind]
    fit: RefitSettings
    positions: int | Literal["every"] = 1

    @cached_property
    def source(self) -> AblationSource:
        """Statistics from which the ablations are made."""
        study, longest = self.study, max(int(batch.lengths.max()) for batch in self.study.batches)
        positions = longest if self.positions == "every" else self.positions
        return AblationSource(study.model, study.task, self.level, positions, study.track)

    @cached_property
    def prepared(self) -> dict[AblationKind, Ablation]:
        """Ablations by kind; those by learned constants as their training starts."""
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
    """Behaviour under a kind from the pieces of `UnitAblations.measured`, on the prompts of the clean model's."""
    measures = {name: torch.cat([piece[f"{kind}.{name}"] for piece in pieces]) for name in MEASURES}
    return Behaviour(**measures, identities=clean.identities)
