"""Tables and figures of interactions of units."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from oa_train.figures.interactions import interaction_bars, interaction_map
from oa_train.figures.style import Figure
from oa_train.metrics.estimates import Estimate, written
from oa_train.models.levels import Level
from oa_train.studies.interact_settings import InteractSettings
from oa_train.studies.joint import AND
from oa_train.studies.study import MOST_LISTED, Row, Table, interval, spoken

# Column titles, by suffix of the row's column, in the tables of joint effects and of conditional effects.
TOGETHER = {"joint": "together", "apart": "sum of\nsingle effects", "interaction": "interaction"}
GROWTH = {"alone": "alone", "conditional": "given the\nprimary set", "interaction": "growth"}


@dataclass(frozen=True)
class InteractionView:
    """Tables and figures of rows of `interact`, which are either all conditional or all joint.

    Attributes:
        settings: settings of the study.
        level: level of the units.
        primary: names of the units in the primary set.
        subject: model and task, for titles.
        prompts: the test prompts, for titles.
    """

    settings: InteractSettings
    level: Level
    primary: Sequence[str]
    subject: str
    prompts: str

    @property
    def _effect(self) -> str:
        return "drop in the logit difference" if self.settings.effect == "logit_difference" else self._measure

    @property
    def _measure(self) -> str:
        return {"kl": "KL divergence"}.get(self.settings.effect, spoken(self.settings.effect))

    def shown(self, rows: Sequence[Row]) -> Iterator[Table | str]:
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

    def map(self, rows: Sequence[Row], single: Mapping[str, Estimate]) -> Figure | None:
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

    def bars(self, rows: Sequence[Row]) -> Figure:
        """Interactions of the first rows, with intervals."""
        conditional = _are_conditional(rows)
        units = f"each unit with {_short(self.primary)} ablated" if conditional else "units together"
        axis = (
            "effect given the primary set minus effect alone" if conditional else "joint effect minus single effects"
        )
        return interaction_bars(
            [_short(row["units"].split(AND)) for row in rows],
            [interval(row[self.settings.interaction]) for row in rows],
            [row["significant"] for row in rows],
            f"{axis} ({self._effect}, nats)",
            f"{self.subject}: {spoken(self.settings.ablation)} ablation of {units}\n"
            f"blue: significantly beyond ±{self.settings.threshold:g} nats",
        )


def _are_conditional(rows: Sequence[Row]) -> bool:
    return bool(rows[0]["form"] == "conditional")


def _short(names: Sequence[str]) -> str:
    """Names of the units of a set; with more than three, the first name and a count."""
    return AND.join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
