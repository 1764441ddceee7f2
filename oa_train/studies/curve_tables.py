"""Behaviour along the curves of `curve`: rows, summary statistics and tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.registry import ABLATION_KINDS, AblationName
from oa_train.errors import ConfigurationError
from oa_train.figures.curves import DrawnCurve
from oa_train.metrics.curves import area, holds_until, recovery_area
from oa_train.metrics.estimates import Estimate
from oa_train.metrics.measures import MEASURES
from oa_train.shapes import Float, Tensor
from oa_train.studies.comparison_tables import label
from oa_train.studies.study import differences, estimates


@dataclass(frozen=True, eq=False)
class MeasuredCurve:
    """Behaviour under one ablation along one order.

    Attributes:
        ranking: name of the ranking.
        draw: number of a random order; None for other rankings, and for the mean over random orders.
        ablation: kind of ablation.
        behaviour: behaviour at every point, the clean model first and everything ablated last.
    """

    ranking: str
    draw: int | None
    ablation: AblationName
    behaviour: Behaviour

    def summary(
        self, fractions: Float[Tensor, " point"], broken_by: Literal["kl", "accuracy"], bound: float
    ) -> dict[str, Estimate]:
        """Areas and the last fraction before the curve breaks; no `recovery_area` if there is nothing to recover."""
        measured, identities = self.behaviour, self.behaviour.identities
        rise = measured.kl if broken_by == "kl" else measured.accuracy[:1] - measured.accuracy
        recovery = recovery_area(fractions, measured.logit_difference, identities)
        return {
            "kl_area": area(fractions, measured.kl, identities),
            **({} if recovery is None else {"recovery_area": recovery}),
            "holds_until": holds_until(fractions, rise, bound, identities),
        }

    def rows(self, ablated: Sequence[int]) -> Iterator[dict[str, Any]]:
        """A row for each point; `ablated` holds the number of units ablated at each."""
        for point, number in enumerate(ablated):
            row: dict[str, Any] = {"ranking": self.ranking, "draw": self.draw, "ablation": self.ablation}
            row |= {"total": ABLATION_KINDS[self.ablation].total, "fraction": number / ablated[-1], "ablated": number}
            row |= {"kept": ablated[-1] - number, **estimates(self.behaviour, point)}
            row |= differences(self.behaviour, self.behaviour, point, 0, "clean")
            del row["kl_minus_clean"]
            yield row

    def drawn(self) -> DrawnCurve:
        """The curve as the figure takes it."""
        points = [estimates(self.behaviour, point) for point in range(len(self.behaviour.kl))]
        kl, accuracy = ([of_point[measure] for of_point in points] for measure in ("kl", "accuracy"))
        return DrawnCurve(self.ranking, self.ablation, label(self.ablation), kl, accuracy)


def numbers_ablated(n_parts: int, fractions: Sequence[float], sizes: Sequence[int] | None) -> list[int]:
    """Numbers of ablated parts in ascending order, from 0 to all, given the ablated fractions or the numbers kept.

    Raises:
        ConfigurationError: a size is not between 0 and the number of parts.
    """
    for size in sizes or ():
        if not 0 <= size <= n_parts:
            raise ConfigurationError(f"sizes names {size}; {n_parts} parts are selected.")
    of_fractions = {int(fraction * n_parts + 0.5) for fraction in fractions}
    numbers = of_fractions if sizes is None else {n_parts - size for size in sizes}
    return sorted(numbers | {0, n_parts})


def pooled(curves: Sequence[MeasuredCurve]) -> list[MeasuredCurve]:
    """The curves, with the draws of a ranking under an ablation averaged prompt by prompt."""
    groups: dict[tuple[str, AblationName], list[MeasuredCurve]] = {}
    for curve in curves:
        groups.setdefault((curve.ranking, curve.ablation), []).append(curve)
    return [
        replace(group[0], draw=None, behaviour=_combined([curve.behaviour for curve in group], _mean))
        for group in groups.values()
    ]


def chosen_points(behaviour: Behaviour, points: Sequence[int], clean: Behaviour) -> Behaviour:
    """Behaviour of the clean model, then of the circuits with these indices."""
    return _combined([clean, behaviour], lambda values: torch.cat([values[0], values[1][list(points)]]))


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(dim=0)


def _combined(behaviours: Sequence[Behaviour], combine: Callable[[list[Tensor]], Tensor]) -> Behaviour:
    """Behaviour that combines each measure of several behaviours on the same prompts."""
    measures = {name: combine([getattr(behaviour, name) for behaviour in behaviours]) for name in MEASURES}
    return Behaviour(**measures, identities=behaviours[0].identities)


def summary_cells(
    curves: Sequence[MeasuredCurve], summaries: Sequence[Mapping[str, Estimate]], holds: str
) -> list[dict[str, Any]]:
    """Table rows, one for each ranking and ablation."""
    return [
        {
            "ranking": curve.ranking,
            "ablation": label(curve.ablation),
            "KL area": summary["kl_area"],
            "recovery area,\nlogit difference": summary.get("recovery_area"),
            holds: _share(summary["holds_until"]),
        }
        for curve, summary in zip(curves, summaries, strict=True)
    ]


def _share(estimate: Estimate) -> str:
    low, high = estimate.ci95
    return f"{estimate.mean:.0%}" if low == high else f"{estimate.mean:.0%} [{low:.0%}, {high:.0%}]"


def point_cells(curves: Sequence[MeasuredCurve], ablated: Sequence[int]) -> list[dict[str, Any]]:
    """Table rows, one for each point, with a column for each ranking."""
    return [
        {"ablated": f"{number:,} ({number / ablated[-1]:.0%})"}
        | {curve.ranking: estimates(curve.behaviour, point)["kl"] for curve in curves}
        for point, number in enumerate(ablated)
    ]
