"""Options of the study `interact`."""

from dataclasses import dataclass, field
from typing import Literal

from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import AblationName, check_kind
from oa_train.checks import check_at_least
from oa_train.errors import ConfigurationError
from oa_train.metrics.measures import Loss, check_loss
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.sites import DEFAULT_SITES, check_dictionaries
from oa_train.studies.options import check_unit_options


@dataclass(frozen=True)
class InteractSettings:
    """Settings of `interact`.

    Attributes:
        sites: kinds of site whose units are ablated, as in `scan`.
        components: shell patterns of the units that are paired, and whose effect given `primary` is measured.
        dictionaries: sparse autoencoders, whose features are the units of the kind `features`.
        pairs: `all`, or a list of pairs of unit names. By default all pairs, unless there are groups or a primary set.
        groups: lists of names or patterns; the units of each list are ablated together.
        primary: names or patterns of a set; the effect of every other unit is measured with and without it ablated.
        most_pairs: maximum number of pairs; if there are more, only the units with the largest single effects are
            paired.
        scan: folder of a finished scan, whose single effects select those units; by default they are measured.
        ablation: kind of ablation; under `optimal` every set of units has its own constants.
        effect: loss whose increase is the effect that is ranked and tested: `kl`, `logit_difference` (its decrease) or
            `cross_entropy`. The table has all of them.
        positions: number of positions with their own constants, as in `scan`.
        fit: training of the constants of optimal ablation.
        parts_at_once: number of sets whose constants are trained together; limits memory without changing results.
            Each such piece is written when it is done.
        threshold: nats; an interaction is significant if its absolute value is significantly larger.
        false_discovery_rate: expected share of false positives among the significant interactions.
    """

    sites: list[str] = field(default_factory=lambda: [*DEFAULT_SITES])
    components: str | list[str] = "*"
    dictionaries: list[DictionarySpec] = field(default_factory=list)
    pairs: list[list[str]] | Literal["all"] | None = None
    groups: list[list[str]] = field(default_factory=list)
    primary: str | list[str] = field(default_factory=list)
    most_pairs: int = 120
    scan: str | None = None
    ablation: AblationName = "optimal"
    effect: Loss = "kl"
    positions: int | Literal["every"] = 1
    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=100, batch_size=8, evaluate_every=25))
    parts_at_once: int = 64
    threshold: float = 0.01
    false_discovery_rate: float = 0.05

    def __post_init__(self) -> None:
        check_unit_options(self.parts_at_once, self.positions, self.threshold, self.false_discovery_rate)
        check_kind("ablation", self.ablation)
        check_loss("effect", self.effect)
        check_dictionaries(self.sites, len(self.dictionaries))
        check_at_least(1, most_pairs=self.most_pairs)
        if isinstance(self.pairs, str) and self.pairs != "all":
            raise ConfigurationError(f"pairs is {self.pairs!r}; expected all, or a list of pairs of names.")
        for pair in self.pairs if isinstance(self.pairs, list) else []:
            if len(pair) != 2:
                raise ConfigurationError(f"pairs has {pair}; expected two names in each. Larger sets are groups.")
        if not self.all_pairs and not self.pairs and not self.groups and not self.primary:
            raise ConfigurationError("pairs is empty, and there are no groups and no primary set. Name one of them.")

    @property
    def all_pairs(self) -> bool:
        """True if all pairs of units are made."""
        return self.pairs == "all" or (self.pairs is None and not self.groups and not self.primary)

    @property
    def interaction(self) -> str:
        """Name of the column by which rows are sorted."""
        return f"{self.effect}_interaction"
