"""Units ablated together: their joint effect compared with the sum of their single effects."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, ClassVar

import numpy as np

from oa_train.ablations.evaluation import Behaviour
from oa_train.errors import ConfigurationError
from oa_train.figures.interactions import interaction_bars, interaction_map
from oa_train.figures.style import Figure
from oa_train.metrics.estimates import Estimate, estimate, written
from oa_train.metrics.measures import LOSS_SIGNS, Loss
from oa_train.metrics.ranks import beyond
from oa_train.progress import Stage
from oa_train.shapes import Float, Tensor
from oa_train.studies.interact_settings import InteractSettings as InteractSettings
from oa_train.studies.joint_sets import AND, Joint, n_screened, ranked_units, screening_line
from oa_train.studies.options import patterns_of, selected_units
from oa_train.studies.rankings import effects_of_scan
from oa_train.studies.study import MOST_LISTED, Findings, Row, Table, estimates, spoken
from oa_train.studies.unit_study import UnitStudy

# Column titles, by suffix of the row's column, in the tables of joint effects and of conditional effects.
TOGETHER = {"joint": "together", "apart": "sum of\nsingle effects", "interaction": "interaction"}
GROWTH = {"alone": "alone", "conditional": "given the\nprimary set", "interaction": "growth"}


class Interact(UnitStudy[InteractSettings]):
    """Ablates units together: does their joint effect differ from the sum of their single effects?

    The effect of an ablation is the KL divergence, or the increase of another loss over the clean model's. Rows: first
    pairs and groups, the largest interaction first, with the measures of the joint ablation, and for each loss the
    joint effect (`x_joint`), the sum of the single effects (`x_apart`) and the paired difference of the two
    (`x_interaction`). Above 0, units back each other up; below 0, their effects overlap. Then, with a primary set,
    every other unit, sorted by how much its effect grows once that set is ablated: its effect alone (`x_alone`), its
    effect given the set (`x_conditional`), and the growth, which is the interaction of the unit and the set.

    Raises:
        ConfigurationError: a unit is unknown or paired with itself, a group or the selection has too few units, or the
            selection is contained in the primary set.
        ArtefactError: `scan` is not a finished scan of this model and of these units.
        TaskError: the task has no prompts for the ablation.
    """

    name = "interact"
    Settings: ClassVar[type] = InteractSettings
    settings: InteractSettings

    def check(self) -> None:
        """Select the units, pairs, groups and the primary set."""
        super().check()
        settings = self.settings
        patterns, primary = patterns_of(settings.components), patterns_of(settings.primary)
        pairs = settings.pairs if isinstance(settings.pairs, list) else []
        named = [name for names in (*pairs, *settings.groups) for name in names]
        all_patterns = [*patterns, *primary, *named]
        self.level, _ = selected_units(self.model.config, settings.sites, all_patterns, settings.dictionaries)
        self.selected, self.primary = self.level.select(patterns), self.level.select(primary)
        if len(self.selected) < 1 + settings.all_pairs:
            raise ConfigurationError(
                f"components {patterns} selects {' '.join(self.selected) or 'no unit'}; expected at least "
                f"{'two units, of which pairs are made' if settings.all_pairs else 'one unit'}."
            )
        self.joints = [Joint.pair(self.level, *pair) for pair in pairs]
        self.joints += [Joint.group(self.level, group) for group in settings.groups]
        others = [name for name in self.selected if name not in self.primary] if primary else []
        if primary and not others:
            raise ConfigurationError(
                f"primary {primary} contains all {len(self.selected)} selected units, so that no effect can grow. "
                "Select more components, or a smaller primary set."
            )
        self.conditionals = [Joint("conditional", (self.primary, (name,))) for name in others]
        self.choose_kinds([settings.ablation])
        self.n_paired = n_screened(len(self.selected), settings.most_pairs) if settings.all_pairs else 0
        self.scanned = (
            effects_of_scan(settings.scan, self.level, self.selected, self.fingerprint, settings.ablation)
            if settings.scan is not None and settings.all_pairs
            else None
        )
        self.units = self._alone()

    def _alone(self) -> tuple[str, ...]:
        """Units that are ablated alone, in mask order."""
        single = {name for joint in (*self.joints, *self.conditionals) for name in joint.alone}
        if self.scanned is not None:
            single |= set(ranked_units(self.scanned, self.n_paired))
        elif self.settings.all_pairs:
            single |= set(self.selected)
        return self._in_order(single)

    @property
    def _n_sets(self) -> int:
        """Number of sets of several units that are ablated together."""
        pairs = self.n_paired * (self.n_paired - 1) // 2
        return pairs + len(self.joints) + len(self.conditionals) + (len(self.primary) > 1)

    def plan(self) -> list[Stage]:
        """The clean model and the statistics; then the pieces of single units, and those of sets."""
        return [Stage("the clean model", self.task.n_test), *self.piece_stages(len(self.units), self._n_sets)]

    def run(self) -> Findings:
        """Measure single units, choose the pairs, measure the sets, and compare."""
        clean, kind = self.clean_behaviour(), self.settings.ablation
        alone = self.behaviours([(name,) for name in self.units], "single units", clean)[kind]
        effects = dict(zip(self.units, _effects(alone, clean, self.settings.effect), strict=True))
        if self.scanned is not None:
            ranking = self.scanned
        else:
            ranking = {name: float(effects[name].mean()) for name in self.selected if self.settings.all_pairs}
        paired = ranked_units(ranking, self.n_paired)
        joints = [Joint("pair", ((first,), (second,))) for first, second in combinations(self._in_order(paired), 2)]
        joints += self.joints
        questions = [*joints, *self.conditionals]
        sets = [self.primary] * (len(self.primary) > 1) + [joint.units for joint in questions]
        n_alone = self.n_pieces(len(self.units))
        together = self.behaviours(sets, "sets of units", clean, n_alone)[kind]
        rows = self._rows(questions, sets, alone, together, clean)
        first = sorted(rows[: len(joints)], key=lambda row: -abs(row[self.settings.interaction].mean))
        grown = sorted(rows[len(joints) :], key=lambda row: -row[self.settings.interaction].mean)
        single = {name: estimate(values, clean.identities) for name, values in effects.items()}
        screened = screening_line(ranking, paired, None if self.scanned is None else kind)
        figures: dict[str, Callable[[], Figure | None]] = {}
        if joints:
            figures |= {"pairs": partial(self._map, first, single), "ranked": partial(self._bars, first)}
        if grown:
            figures["conditional"] = partial(self._bars, grown)
        return Findings(
            [*first, *grown],
            metrics={f"clean_{name}": value for name, value in estimates(clean).items()},
            facts={
                "ablation": kind,
                "effect": self.settings.effect,
                "primary": list(self.primary),
                "alone": single,
                "screened_out": [name for name in ranking if name not in paired],
            },
            shown=[*self._shown(first), *([screened] if screened else []), *self._shown(grown)],
            figures=figures,
            table="interactions",
        )

    def _in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        return self.level.kept(self.level.mask([*names]))

    def _rows(
        self,
        joints: Sequence[Joint],
        sets: Sequence[tuple[str, ...]],
        alone: Behaviour,
        together: Behaviour,
        clean: Behaviour,
    ) -> list[dict[str, Any]]:
        rows = [joint.cells | estimates(together, len(sets) - len(joints) + n) for n, joint in enumerate(joints)]
        for loss in LOSS_SIGNS:
            effects = _effects(together, clean, loss)
            singles = zip(self.units, _effects(alone, clean, loss), strict=True)
            by_set: dict[tuple[str, ...], Tensor] = {(name,): values for name, values in singles}
            if len(self.primary) > 1:
                by_set[self.primary] = effects[0]
            for row, joint, both in zip(rows, joints, effects[len(sets) - len(joints) :], strict=True):
                values = joint.compared(both, [by_set[member] for member in joint.members])
                row |= {f"{loss}_{name}": estimate(value, clean.identities) for name, value in values.items()}
        for conditional in (False, True):
            family = [row for row in rows if (row["form"] == "conditional") is conditional]
            if family:
                tests = beyond(
                    [row[self.settings.interaction] for row in family],
                    self.settings.threshold,
                    self.settings.false_discovery_rate,
                )
                for row, significant, adjusted in zip(family, *tests, strict=True):
                    row |= {"significant": bool(significant), "adjusted_p": float(adjusted)}
        return rows

    @property
    def _effect(self) -> str:
        names = {"kl": "KL divergence", "logit_difference": "drop in the logit difference"}
        return names.get(self.settings.effect, spoken(self.settings.effect))

    def _shown(self, rows: Sequence[Row]) -> Iterator[Table | str]:
        """A table of the first rows, and a line with the number of significant effects."""
        if not rows:
            return
        settings, conditional = self.settings, _are_conditional(rows)
        cells = [
            {"ablated": row["units"]}
            | {
                title: row[settings.interaction]
                if name == "interaction"
                else written(row[f"{settings.effect}_{name}"].mean)
                for name, title in (GROWTH if conditional else TOGETHER).items()
            }
            | {f"significant\n(±{settings.threshold:g})": "yes" if row["significant"] else ""}
            for row in rows[:MOST_LISTED]
        ]
        title = f"Units ablated together and alone under {spoken(settings.ablation)} ablation"
        if conditional:
            title = (
                f"One unit under {spoken(settings.ablation)} ablation, alone and with {_short(self.primary)} ablated"
            )
        listed = f": the first {MOST_LISTED} of {len(rows):,}" if len(rows) > MOST_LISTED else ""
        yield Table(f"{title}, {self._effect} in nats on {self.prompts}{listed}", cells)
        signs = [np.sign(row[settings.interaction].mean) for row in rows if row["significant"]]
        verb = "grow" if conditional else "exceed the sum of single effects"
        yield (
            f"{signs.count(1)} of {len(rows):,} effects {verb} by more than {settings.threshold:g} nats, "
            f"{signs.count(-1)} {'shrink' if conditional else 'fall below it'} "
            f"(false discovery rate {100 * settings.false_discovery_rate:g} %)"
        )

    def _map(self, rows: Sequence[Row], single: Mapping[str, Estimate]) -> Figure | None:
        """Heat map of the pairs among the rows, with the effects of single units."""
        pairs = [row for row in rows if row["form"] == "pair"]
        if not pairs:
            return None
        chosen = {name for row in pairs for name in row["units"].split(AND)}
        names = self.level.kept(self.level.mask(sorted(chosen)))
        table = np.full((len(names), len(names)), np.nan)
        significant = np.zeros(table.shape, dtype=bool)
        for row in pairs:
            first, second = (names.index(name) for name in row["units"].split(AND))
            table[[first, second], [second, first]] = row[self.settings.interaction].mean
            significant[[first, second], [second, first]] = row["significant"]
        title = (
            f"{self.subject}: {spoken(self.settings.ablation)} ablation of pairs\n"
            f"diagonal: single effects; framed: significantly beyond ±{self.settings.threshold:g} nats"
        )
        label = f"joint effect minus single effects ({self._effect}, nats)"
        return interaction_map(
            table, np.array([single[name].mean for name in names]), significant, names, label, title
        )

    def _bars(self, rows: Sequence[Row]) -> Figure:
        """Interactions of the first rows, with intervals."""
        conditional = _are_conditional(rows)
        units = f"each unit with {_short(self.primary)} ablated" if conditional else "units together"
        axis = (
            "effect given the primary set minus effect alone" if conditional else "joint effect minus single effects"
        )
        return interaction_bars(
            [_short(row["units"].split(AND)) for row in rows],
            [row[self.settings.interaction] for row in rows],
            [row["significant"] for row in rows],
            f"{axis} ({self._effect}, nats)",
            f"{self.subject}: {spoken(self.settings.ablation)} ablation of {units}\n"
            f"blue: significantly beyond ±{self.settings.threshold:g} nats",
        )


def _effects(behaviour: Behaviour, clean: Behaviour, loss: Loss) -> Float[Tensor, "set prompt"]:
    """Effect of each ablation: the increase of a loss over the clean model's."""
    return behaviour.loss(loss).double() - clean.loss(loss).double()


def _are_conditional(rows: Sequence[Row]) -> bool:
    return bool(rows[0]["form"] == "conditional")


def _short(names: Sequence[str]) -> str:
    """Names of the units of a set; with more than three, the first name and a count."""
    return AND.join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
