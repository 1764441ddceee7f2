"""Options of the study `sufficient`."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import AblationName, check_kind
from oa_train.checks import check_at_least, check_choice
from oa_train.errors import ConfigurationError
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.sites import DEFAULT_SITES, check_dictionaries
from oa_train.studies.path_tables import RecoveryMeasure

Direction = Literal["restore", "remove"]


@dataclass(frozen=True)
class SufficientSettings:
    """Settings of `sufficient`.

    Attributes:
        direction: `restore` starts from everything ablated, `remove` from everything kept, or from the run's circuit.
        recovery: recovery at which a set is sufficient: the share of the gap between everything ablated and the clean
            model.
        measure: measure of that gap: `kl` (1 - KL / KL with everything ablated), `logit_difference` or `accuracy`.
        ablation: kind of ablation of everything outside the set; by default the run's, or `optimal`.
        sites: kinds of site whose units are candidates; with a run, those of its circuit.
        components: shell patterns of the candidates; all other units are kept.
        dictionaries: sparse autoencoders, whose features are the units of the kind `features`.
        positions: number of positions with their own constants; by default that of the run, or 1, which pools all
            positions.
        candidates: number of units that a round of the search tries, those that did best when last tried; if none of
            them can be moved, the next ones follow.
        at_once: maximum number of units that a round moves.
        pairs: maximum number of pairs, and of swaps, tried when no single unit can be moved; 0 for none.
        least_gain: gain in recovery that restoring a unit or a pair must exceed.
        search_prompts: number of validation prompts used by the search, at most `n_validation`.
        curve_points: maximum number of steps evaluated on the test prompts.
        fit: training of the constants of the set, under `optimal`.
        fit_every: also train constants for every n-th of these steps; by default only for the final set.
    """

    direction: Direction = "restore"
    recovery: float = 0.9
    measure: RecoveryMeasure = "kl"
    ablation: AblationName | None = None
    sites: list[str] = field(default_factory=lambda: [*DEFAULT_SITES])
    components: str | list[str] = "*"
    dictionaries: list[DictionarySpec] = field(default_factory=list)
    positions: int | None = None
    candidates: int = 16
    at_once: int = 1
    pairs: int = 128
    least_gain: float = 0.001
    search_prompts: int = 64
    curve_points: int = 32
    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=150, batch_size=16, evaluate_every=50))
    fit_every: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.recovery <= 1:
            raise ConfigurationError(f"recovery is {self.recovery}; expected a share above 0 and at most 1.")
        check_choice("direction", self.direction, get_args(Direction))
        check_choice("measure", self.measure, get_args(RecoveryMeasure))
        if self.ablation is not None:
            check_kind("ablation", self.ablation)
        check_at_least(0, pairs=self.pairs)
        for name in ("candidates", "at_once", "positions", "fit_every"):
            check_at_least(1, **{name: getattr(self, name)})
        check_at_least(2, search_prompts=self.search_prompts, curve_points=self.curve_points)
        if not 0 <= self.least_gain < 1:
            raise ConfigurationError(f"least_gain is {self.least_gain}; expected a share of at least 0 and below 1.")
        check_dictionaries(self.sites, len(self.dictionaries))
