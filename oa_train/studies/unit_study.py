"""Studies that ablate sets of units under several kinds of ablation and are measured in pieces."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch

from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import fit_passes
from oa_train.ablations.registry import AblationName
from oa_train.metrics.measures import MEASURES
from oa_train.progress import Stage
from oa_train.shapes import Bool, Tensor
from oa_train.studies.ablation_study import AblationStudy
from oa_train.studies.findings import plain
from oa_train.studies.options import n_positions
from oa_train.studies.pieces import Piece, Pieces
from oa_train.studies.study import S, statistics_stages


class UnitStudy(AblationStudy[S]):
    """A study that ablates sets of units, with the settings `fit`, `positions` and `parts_at_once`.

    Attributes:
        units: units that are ablated alone; set in `check`.
    """

    resumable = True
    settings: Any
    units: Sequence[str]

    @property
    def positions(self) -> int:
        """Number of positions with their own constants."""
        return n_positions(self.settings.positions, self.batches)

    @cached_property
    def pieces(self) -> Pieces:
        """Measured pieces, stored in the study's folder if it has one."""
        about = {
            "settings": plain({**asdict(self.settings), "dictionaries": None}),  # the level identifies them
            "units": list(self.units),
            "level": self.level.header(),
            "ablations": list(self.kinds),
            "task": self.task.describe() | {"n_test": self.task.n_test, "n_means": self.task.n_means},
            "fingerprint": self.fingerprint,
        }
        return Pieces(self.folder, about)

    def n_pieces(self, n_sets: int) -> int:
        """Number of pieces in which this many sets are measured."""
        at_once: int = self.settings.parts_at_once
        return -(-n_sets // at_once)

    def piece_stages(self, *n_sets: int) -> list[Stage]:
        """The statistics, then constants and test prompts for each missing piece under each kind.

        The pieces of the first number of sets are followed by those of the next.
        """
        at_once, fit = self.settings.parts_at_once, self.settings.fit
        sizes = [min(at_once, n - start) for n in n_sets for start in range(0, n, at_once)]
        missing = [sizes[number] for number in self.pieces.missing(len(sizes))]
        stages = statistics_stages(self.kinds, self.task) if missing else []
        for size in missing:
            stages += self.stages_under_each(size, fit_passes(size, fit, self.task.n_validation, 1))
        return stages

    def behaviours(
        self, sets: Sequence[Sequence[str]], described: str, clean: Behaviour, first: int = 0
    ) -> dict[AblationName, Behaviour]:
        """Behaviour with each set of units ablated, under each kind, measured in pieces numbered from `first`."""
        at_once = self.settings.parts_at_once

        def measure(number: int) -> Piece:
            start = (number - first) * at_once
            masks = torch.stack([~self.level.mask(names) for names in sets[start : start + at_once]])
            return self.measured(masks, f"{described} {start + 1} to {start + len(masks)}")

        pieces = list(self.pieces.all(first + self.n_pieces(len(sets)), measure, first))
        by_kind = {}
        for kind in self.kinds:
            measures = {name: torch.cat([piece[f"{kind}.{name}"] for piece in pieces]) for name in MEASURES}
            by_kind[kind] = Behaviour(**measures, identities=clean.identities)
        return by_kind

    def measured(self, masks: Bool[Tensor, "circuit entry"], described: str) -> Piece:
        """Measures of circuits under each kind, as tensors `<kind>.<measure>` of shape [circuit, prompt]."""
        fit = self.settings.fit
        constants = partial(self.fitted_constants, masks, fit, described)
        behaviours = self.under_each(masks, constants, described, fit.rows_per_run)
        return {
            f"{kind}.{measure}": getattr(behaviour, measure)
            for kind, behaviour in behaviours.items()
            for measure in MEASURES
        }
