"""Robustness of a circuit: are the parts outside it irrelevant in every combination, or only if all are ablated?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import RefitSettings, fit_passes
from oa_train.ablations.registry import ABLATION_KINDS, AblationName
from oa_train.ablations.worst_mask import AscentSettings
from oa_train.checks import check_at_least
from oa_train.errors import ConfigurationError
from oa_train.figures.style import Figure
from oa_train.figures.subsets import Subsets, subsets_figure
from oa_train.metrics.estimates import Estimate, written
from oa_train.metrics.measures import Loss, check_loss
from oa_train.progress import Stage
from oa_train.seeds import torch_generator
from oa_train.shapes import Bool, Float, Tensor
from oa_train.studies.ablation_study import AblationStudy
from oa_train.studies.comparison_tables import label
from oa_train.studies.findings import listed
from oa_train.studies.options import check_ablations
from oa_train.studies.study import Findings, Row, Table, differences, estimates, spoken, statistics_stages
from oa_train.studies.worst_mask_search import WorstMask, most_kept, search_stages, worst_mask

ALL_OFF, RANDOM, WORST, VERTEX = "all off", "random subset", "worst", "worst vertex"

# Maximum number of parts of the worst mask that are listed.
MOST_LISTED_PARTS = 10


@dataclass(frozen=True)
class RobustnessSettings:
    """Settings of `robustness`.

    Attributes:
        ablations: kinds of ablation of the outside parts; by default the circuit's own.
        n_subsets: number of random subsets of the outside parts to keep, for each density; 0 for none.
        densities: probabilities with which each outside part is kept.
        ascent: settings of the search for the worst mask.
        loss: loss that the worst mask maximises.
        tolerance: increase in KL divergence, in nats, that counts as negligible: the outside parts are irrelevant if
            the whole 95 % interval of the worst mask's increase is at or below it.
        fit: training of constants for a learned ablation for which the circuit has none.
    """

    ablations: list[AblationName] | None = None
    n_subsets: int = 32
    densities: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 0.75, 0.9])
    ascent: AscentSettings = field(default_factory=AscentSettings)
    loss: Loss = "kl"
    tolerance: float = 0.01
    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=150, batch_size=16, evaluate_every=50))

    def __post_init__(self) -> None:
        check_ablations(self.ablations)
        check_loss("loss", self.loss)
        check_at_least(0, n_subsets=self.n_subsets, tolerance=self.tolerance)
        for density in self.densities:
            if not 0 <= density <= 1:
                raise ConfigurationError(f"densities names {density}; expected probabilities between 0 and 1.")
        if len(set(self.densities)) < len(self.densities):
            raise ConfigurationError(f"densities names one of {', '.join(map(str, self.densities))} twice.")


class Robustness(AblationStudy[RobustnessSettings]):
    """Keeps the parts outside a circuit in many combinations: does the circuit do as well in all of them?

    A circuit is usually evaluated with everything outside it ablated. Here random subsets of the outside parts are
    kept, and projected gradient ascent on validation prompts searches for the worst mask: values in [0, 1] for the
    outside parts, the same for all prompts. All masks are evaluated on the test prompts. The circuit itself is always
    kept, and so are parts that its training could not ablate.

    Rows: one for each ablation and mask (`all off`, `random subset` with its `density` and `draw`, `worst vertex`,
    whose values are 0 or 1, and `worst`), with the measures and their paired differences from `all off`
    (`x_minus_all_off`).

    Raises:
        ConfigurationError: nothing is outside the circuit, or there are more ascent prompts than validation prompts.
        TaskError: the task has no prompts for an ablation that was asked for.
    """

    name = "robustness"
    Settings: ClassVar[type] = RobustnessSettings
    asks_of = "one"

    def check(self) -> None:
        """Reject a circuit with nothing outside it."""
        super().check()
        self.trained = self.circuits[0]
        self.level, self.mask = self.trained.circuit.level, self.trained.circuit.mask
        self.outside: Bool[Tensor, " entry"] = ~self.mask & self.level.selected(self.trained.selected)
        if not self.outside.any():
            raise ConfigurationError(
                f"{self.trained.name} keeps all {self.level.parts} that it could leave out, so there is nothing "
                "outside it."
            )
        self.choose_kinds(self.settings.ablations or [self.trained.ablation])
        n_prompts, n_validation = self.settings.ascent.n_prompts, self.task.n_validation
        if n_prompts > n_validation:
            raise ConfigurationError(
                f"ascent.n_prompts is {n_prompts}, but there are {n_validation} validation prompts. Lower it, or "
                "raise n_validation of the task."
            )

    def _has_constants(self, kind: AblationName) -> bool:
        """True if the circuit has constants for this ablation."""
        return kind == self.trained.ablation and self.trained.constants is not None

    def plan(self) -> list[Stage]:
        """The clean model and the statistics; then, for each ablation, constants, the ascent and the test prompts."""
        settings, task = self.settings, self.task
        lacking = [kind for kind in self.kinds if not self._has_constants(kind)]
        stages = [Stage("the clean model", task.n_test), *statistics_stages(lacking, task)]
        n_subsets = settings.n_subsets * len(settings.densities)
        for kind in self.kinds:
            if ABLATION_KINDS[kind].learned and kind in lacking:
                stages.append(Stage("constants", fit_passes(1, settings.fit, task.n_validation, 1)))
            stages += search_stages(settings.ascent, n_subsets)
            stages.append(Stage("the test prompts", (3 + n_subsets) * task.n_test))
        return stages

    def run(self) -> Findings:
        """Evaluate the random subsets and the worst mask under each ablation."""
        clean = self.clean_behaviour()
        prepared = {kind: self._prepared(kind) for kind in self.kinds}
        subsets = self._subsets()
        drawn = torch.stack([*subsets.values()]) if subsets else torch.zeros(0, len(self.level))
        rows, searches = dict[AblationName, list[Row]](), dict[AblationName, WorstMask]()
        for kind in self.kinds:
            ablation = prepared[kind]
            if ABLATION_KINDS[kind].learned and not self._has_constants(kind):
                (ablation,) = self.fitted_constants(self.mask.unsqueeze(0), self.settings.fit, "the circuit")
            search = worst_mask(
                self.source, self.mask, self.outside, drawn, ablation, self.settings.ascent, self.settings.loss
            )
            searches[kind] = search
            masks = torch.cat([torch.stack([self.mask.float(), search.vertex, search.mask]), drawn])
            shown, rows_per_run = f"masks under {spoken(kind)} ablation", self.settings.ascent.rows_per_run
            behaviour = self.behaviour(self.level, masks, [ablation], shown, rows_per_run)
            rows[kind] = list(self._rows(kind, behaviour, list(subsets)))
        metrics = {f"clean_{name}": value for name, value in estimates(clean).items()}
        for kind, of_kind in rows.items():
            metrics |= _metrics(kind, of_kind)
        return Findings(
            [row for of_kind in rows.values() for row in of_kind],
            metrics=metrics,
            facts={
                "n_outside": int(self.outside.sum()),
                "ablations": {kind: self._facts(of_kind, searches[kind]) for kind, of_kind in rows.items()},
            },
            shown=list(self._shown(rows, searches)),
            figures={"subsets": partial(self._figure, rows)},
            circuit=self.trained.circuit.counts(),
            table="masks",
        )

    def _prepared(self, kind: AblationName) -> Ablation:
        constants = self.trained.constants
        if constants is not None and self._has_constants(kind):
            return constants.of_level(self.level)
        return ABLATION_KINDS[kind].prepare(self.source)

    def _subsets(self) -> dict[tuple[float, int], Float[Tensor, " entry"]]:
        """Masks that keep random subsets of the outside parts, by density and draw; the same for every ablation."""
        masks = {}
        for density in self.settings.densities:
            for draw in range(1, self.settings.n_subsets + 1):
                generator = torch_generator(self.task.seed, "subset of the outside", str(density), draw)
                kept = torch.rand(len(self.level), generator=generator) < density
                masks[density, draw] = (self.mask | (self.outside & kept)).float()
        return masks

    def _rows(self, kind: AblationName, behaviour: Behaviour, drawn: Sequence[tuple[float, int]]) -> Iterator[Row]:
        named: list[tuple[str, float | None, int | None]] = [(mask, None, None) for mask in (ALL_OFF, VERTEX, WORST)]
        named += [(RANDOM, density, draw) for density, draw in drawn]
        for number, (mask, density, draw) in enumerate(named):
            row: dict[str, Any] = {"mask": mask, "density": density, "draw": draw, "ablation": kind}
            row |= {"total": ABLATION_KINDS[kind].total} | estimates(behaviour, number)
            yield row | differences(behaviour, behaviour, number, 0, "all_off")

    def _facts(self, rows: Sequence[Row], search: WorstMask) -> dict[str, Any]:
        return {
            "search": {"n_prompts": self.settings.ascent.n_prompts, **search.losses},
            "worst_mask": most_kept(search.mask, self.outside, self.level.names),
            "random_subsets": _spread(rows),
        }

    def _shown(
        self, rows: Mapping[AblationName, Sequence[Row]], searches: Mapping[AblationName, WorstMask]
    ) -> Iterator[Table | str]:
        for kind, of_kind in rows.items():
            by_mask = {row["mask"]: row for row in of_kind}
            cells = [
                {
                    "outside the circuit": mask,
                    "KL": by_mask[mask]["kl"],
                    "KL minus\nall off": None if mask == ALL_OFF else by_mask[mask]["kl_minus_all_off"],
                    "accuracy": f"{by_mask[mask]['accuracy'].mean:.3f}",
                }
                for mask in (ALL_OFF, VERTEX, WORST)
            ]
            for spread in _spread(of_kind):
                low, median, high = (written(spread[name]) for name in ("lowest", "median", "highest"))
                name = f"{spread['n']} random subsets, {spread['density']:.0%} kept"
                cells.append({"outside the circuit": name, "KL": f"{median} (median), {low} to {high}"})
            yield Table(
                f"{self.trained.size}, everything else under {label(kind)} ablation\n"
                f"KL divergence in nats on {self.prompts}, mean ± 95 % interval",
                cells,
            )
            yield self._sentence(kind, max(of_kind, key=lambda row: row["kl"].mean), by_mask[WORST])
            yield self._kept(searches[kind])

    def _sentence(self, kind: AblationName, hardest: Row, worst: Row) -> str:
        """Verdict on the outside parts, based on the mask that is worst on the test prompts."""
        is_found = hardest["kl"].mean <= worst["kl"].mean
        gap, tolerance = (worst if is_found else hardest)["kl_minus_all_off"], self.settings.tolerance
        low, high = gap.ci95
        if high <= tolerance:
            verdict = "irrelevant in every combination that was tried"
        else:
            verdict = "not irrelevant in every combination" if low > tolerance else "not shown to be irrelevant"
        mask = "the worst mask" if is_found else f"the mask that hurts most on the test prompts ({hardest['mask']})"
        return (
            f"The {int(self.outside.sum()):,} {self.level.parts} outside are {verdict}: under {spoken(kind)} ablation "
            f"{mask} adds {gap} nats to the KL divergence of all off (tolerance {tolerance:g})."
        )

    def _kept(self, search: WorstMask) -> str:
        values = most_kept(search.mask, self.outside, self.level.names)
        on = [f"{name} {value:.2f}" for name, value in values.items() if value > 0]
        if not on:
            return "The worst mask is all off."
        n_off = len(values) - len(on)
        return f"Kept most in the worst mask: {listed(on, MOST_LISTED_PARTS)}; {n_off} of {len(values)} off."

    def _figure(self, rows: Mapping[AblationName, Sequence[Row]]) -> Figure:
        panels = []
        for kind, of_kind in rows.items():
            by_mask = {row["mask"]: row for row in of_kind}
            marked = {mask: by_mask[mask]["kl"] for mask in (ALL_OFF, VERTEX, WORST)}
            panels.append(Subsets(f"{label(kind)} ablation", _random_kl(of_kind), marked))
        return subsets_figure(panels, f"{self.subject}: {self.trained.size}, and the rest in many combinations")


def _metrics(kind: AblationName, rows: Sequence[Row]) -> dict[str, Estimate]:
    by_mask = {row["mask"].replace(" ", "_"): row for row in rows}
    metrics = {f"{mask}_{kind}_kl": by_mask[mask]["kl"] for mask in ("all_off", "worst_vertex", "worst")}
    for mask in ("worst_vertex", "worst"):
        metrics[f"{mask}_minus_all_off_{kind}_kl"] = by_mask[mask]["kl_minus_all_off"]
    return metrics


def _random_kl(rows: Sequence[Row]) -> dict[float, list[float]]:
    """KL divergences of the random subsets at each density, in nats."""
    by_density: dict[float, list[float]] = {}
    for row in rows:
        if row["mask"] == RANDOM:
            by_density.setdefault(row["density"], []).append(row["kl"].mean)
    return by_density


def _spread(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Lowest, median and highest KL divergence of the random subsets at each density, in nats."""
    names = ("lowest", "median", "highest")
    return [
        {"density": density, "n": len(kl)} | dict(zip(names, np.quantile(kl, [0, 0.5, 1]).tolist(), strict=True))
        for density, kl in _random_kl(rows).items()
    ]
