"""Sets of units ablated under several kinds of ablation, measured piece by piece."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import fit_passes
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
    """The ablations of a study, for any sets of units.

    Attributes:
        study: supplies model, prompts and progress, and the settings `fit`, `positions` and `parts_at_once`.
        level: level of the units.
        units: those that the study ablates.
        kinds: kinds of ablation.
    """

    study: Study[Any]
    level: Level
    units: Sequence[str]
    kinds: Sequence[AblationKind]

    @cached_property
    def source(self) -> AblationSource:
        """Statistics from which the ablations are made."""
        study, positions = self.study, n_positions(self.study.settings.positions, self.study.batches)
        return AblationSource(study.model, study.task, self.level, positions, study.track)

    @cached_property
    def prepared(self) -> dict[AblationKind, Ablation]:
        """Ablations by kind; of a learned one, the initial constants."""
        return {kind: KINDS[kind].prepare(self.source) for kind in self.kinds}

    @cached_property
    def pieces(self) -> Pieces:
        """Measured pieces, in the study's folder if it has one."""
        study, task = self.study, self.study.task
        about = {
            "settings": plain({**asdict(study.settings), "dictionaries": None}),  # the level names them
            "units": list(self.units),
            "level": self.level.header(),
            "ablations": list(self.kinds),
            "task": task.describe() | {"n_test": task.n_test, "n_means": task.n_means},
            "fingerprint": study.fingerprint,
        }
        return Pieces(study.folder, about)

    def n_pieces(self, n_sets: int) -> int:
        """Pieces that this many sets are measured in."""
        return -(-n_sets // self._at_once)

    @property
    def _at_once(self) -> int:
        at_once: int = self.study.settings.parts_at_once
        return at_once

    def stages(self, *n_sets: int) -> list[Stage]:
        """Statistics, then constants and test prompts under each kind of all pieces that are missing.

        The pieces are those of the first number of sets, followed by those of the next.
        """
        task, fit = self.study.task, self.study.settings.fit
        sizes = [min(self._at_once, n - start) for n in n_sets for start in range(0, n, self._at_once)]
        missing = [sizes[number] for number in self.pieces.missing(len(sizes))]
        stages = statistics_stages(self.kinds, task) if missing else []
        for size in missing:
            for kind in self.kinds:
                if KINDS[kind].learned:
                    stages.append(Stage("constants", fit_passes(size, fit, task.n_validation, 1)))
                stages.append(Stage("the test prompts", size * task.n_test))
        return stages

    def behaviours(
        self, sets: Sequence[Sequence[str]], described: str, clean: Behaviour, first: int = 0
    ) -> dict[AblationKind, Behaviour]:
        """Behaviour with each set of units ablated, under each kind, in pieces numbered from `first`."""

        def measure(number: int) -> Piece:
            start = (number - first) * self._at_once
            masks = torch.stack([~self.level.mask(names) for names in sets[start : start + self._at_once]])
            return self.measured(masks, f"{described} {start + 1} to {start + len(masks)}")

        pieces = list(self.pieces.all(first + self.n_pieces(len(sets)), measure, first))
        by_kind = {}
        for kind in self.kinds:
            measures = {name: torch.cat([piece[f"{kind}.{name}"] for piece in pieces]) for name in MEASURES}
            by_kind[kind] = Behaviour(**measures, identities=clean.identities)
        return by_kind

    def measured(self, masks: Bool[Tensor, "circuit entry"], described: str) -> Piece:
        """Measures of circuits under each kind, as tensors `<kind>.<measure>` of [circuit, prompt]."""
        assert self.prepared  # gathered before all stages that use them
        fit = self.study.settings.fit
        piece: Piece = {}
        for kind in self.kinds:
            ablations: Sequence[Ablation] = [self.prepared[kind]]
            if KINDS[kind].learned:
                ablations = fitted_constants(self.source, masks, fit, f"fitting constants of {described}")
            shown = f"{described} under {spoken(kind)} ablation"
            behaviour = self.study.behaviour(self.level, masks, ablations, shown, fit.rows_per_run)
            piece |= {f"{kind}.{measure}": getattr(behaviour, measure) for measure in MEASURES}
        return piece
