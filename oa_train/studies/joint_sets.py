"""Sets of units that are ablated together, and the screening of pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from oa_train.ablations.registry import AblationName
from oa_train.errors import ConfigurationError
from oa_train.metrics.estimates import written
from oa_train.models.levels import Level
from oa_train.shapes import Float, Tensor
from oa_train.studies.study import spoken

# Separates the names of units that are ablated together.
AND = " + "


@dataclass(frozen=True)
class Joint:
    """Sets of units whose joint effect is compared with the sum of the effects of each set.

    Attributes:
        form: `pair` or `group` of single units, or `conditional` (the primary set and one other unit).
        members: names of the units of each set.
    """

    form: Literal["pair", "group", "conditional"]
    members: tuple[tuple[str, ...], ...]

    @classmethod
    def pair(cls, level: Level, first: str, second: str) -> "Joint":
        """Two units by name, in mask order; raises `OaTrainError` if one is unknown or both are the same."""
        names = sorted((first, second), key=level.index)
        if first == second:
            raise ConfigurationError(f"pairs has {first} with itself; expected two units.")
        return cls("pair", ((names[0],), (names[1],)))

    @classmethod
    def group(cls, level: Level, patterns: Sequence[str]) -> "Joint":
        """The units that patterns select; raises `ConfigurationError` if there are fewer than two."""
        names = level.select(patterns)
        if len(names) < 2:
            raise ConfigurationError(
                f"The group {[*patterns]} selects {' '.join(names) or 'no unit'}; expected at least two units."
            )
        return cls("group", tuple((name,) for name in names))

    @property
    def units(self) -> tuple[str, ...]:
        """All units that are ablated."""
        return tuple(name for member in self.members for name in member)

    @property
    def alone(self) -> tuple[str, ...]:
        """Units whose single effects are needed."""
        return tuple(member[0] for member in self.members if len(member) == 1)

    @property
    def cells(self) -> dict[str, Any]:
        """Columns that identify the row."""
        if self.form != "conditional":
            return {"form": self.form, "units": AND.join(self.units)}
        primary, (unit,) = self.members
        return {"form": self.form, "units": unit, "primary": AND.join(primary)}

    def compared(
        self, joint: Float[Tensor, " prompt"], members: Sequence[Float[Tensor, " prompt"]]
    ) -> dict[str, Float[Tensor, " prompt"]]:
        """The joint effect, the sum of the members' effects, and the difference of the two.

        For `conditional`, also the unit's effect alone and its effect given the primary set.
        """
        apart = sum(members[1:], members[0])
        values = {"joint": joint, "apart": apart, "interaction": joint - apart}
        if self.form == "conditional":
            values |= {"alone": members[1], "conditional": joint - members[0]}
        return values


def n_screened(n_units: int, most_pairs: int) -> int:
    """Largest number of units that have at most `most_pairs` pairs."""
    return min(n_units, (1 + isqrt(1 + 8 * most_pairs)) // 2)


def ranked_units(effects: Mapping[str, float], n_units: int) -> list[str]:
    """The units with the largest effects, in descending order; ties in mask order."""
    return sorted(effects, key=lambda name: -effects[name])[:n_units]


def screening_line(effects: Mapping[str, float], chosen: Sequence[str], scanned: AblationName | None) -> str | None:
    """Sentence about the units and pairs that were screened out; None if there are none."""
    n_units, n_chosen = len(effects), len(chosen)
    if n_chosen == n_units or not n_chosen:
        return None
    largest = max(value for name, value in effects.items() if name not in chosen)
    n_pairs, n_all = n_chosen * (n_chosen - 1) // 2, n_units * (n_units - 1) // 2
    source = "" if scanned is None else f" in the scan under {spoken(scanned)} ablation"
    return (
        f"Screened out: {n_units - n_chosen:,} of {n_units:,} units, whose single effects are the smallest (at most "
        f"{written(largest)} nats{source}), and so {n_all - n_pairs:,} of {n_all:,} pairs. A backup has a small "
        "effect alone: to find it, name what it may back up as primary."
    )
