"""Every unit of a selection ablated alone, under every ablation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import ABLATION_KINDS, AblationName
from oa_train.engine.direct_attribution import direct_attribution
from oa_train.figures.comparison import Panel, comparison_figure
from oa_train.figures.scans import effect_maps, gap_figure
from oa_train.figures.style import Figure
from oa_train.metrics.estimates import Estimate, estimate, written
from oa_train.metrics.ranks import FLOOR, above, mean_ratio, median_ratio, rank_correlation
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.selection import Nodes
from oa_train.models.sites import DEFAULT_SITES, check_dictionaries
from oa_train.progress import Stage, counted
from oa_train.studies.comparison_tables import alone_cells, kl_by_ablation, label, most_listed
from oa_train.studies.options import check_ablations, check_unit_options, selected_units
from oa_train.studies.study import MOST_LISTED, Findings, Row, Table, differences, estimates
from oa_train.studies.unit_study import UnitStudy


@dataclass(frozen=True)
class ScanSettings:
    """Settings of `scan`.

    Attributes:
        sites: kinds of site whose units are scanned: `heads`, `mlp`, `attention`, `neurons`, `residual`, `embedding`,
            `tokens` or `features`.
        components: shell patterns of the units that are scanned (`a*.h*`, `!m0`), also at a span (`m*@S2`).
        dictionaries: sparse autoencoders, whose features are the units of the kind `features`.
        ablations: kinds of ablation; by default all for which the task has prompts.
        positions: number of positions with their own constants: 1 pools all positions, `every` is as many as the
            prompts have.
        fit: training of the constants of optimal ablation.
        parts_at_once: number of units whose constants are trained together; limits memory without changing results.
            Each such piece is written when it is done.
        threshold: nats; a unit is critical if its KL divergence is significantly larger.
        false_discovery_rate: expected share of false positives among the critical units.
    """

    sites: list[str] = field(default_factory=lambda: [*DEFAULT_SITES])
    components: str | list[str] = "*"
    dictionaries: list[DictionarySpec] = field(default_factory=list)
    ablations: list[AblationName] | None = None
    positions: int | Literal["every"] = 1
    fit: RefitSettings = field(
        default_factory=lambda: RefitSettings(steps=100, batch_size=8, evaluate_every=25, patience=1)
    )
    parts_at_once: int = 64
    threshold: float = 0.01
    false_discovery_rate: float = 0.05

    def __post_init__(self) -> None:
        check_unit_options(self.parts_at_once, self.positions, self.threshold, self.false_discovery_rate)
        check_ablations(self.ablations)
        check_dictionaries(self.sites, len(self.dictionaries))


class Scan(UnitStudy[ScanSettings]):
    """Ablates every unit of a selection alone, under every ablation: how much does each matter?

    Rows: one for each unit and ablation, with all measures, their paired differences from optimal ablation
    (`x_minus_optimal`) and from the clean model (`x_minus_clean`), and whether the unit is `critical`: its KL
    divergence exceeds the threshold in a one-sided t-test, with p-values adjusted for the false discovery rate.
    `direct_attribution` is the unit's direct logit attribution in the clean run (see
    `engine.direct_attribution`), the same under every ablation; units that do not write to the residual
    stream have none.

    Per-prompt values are kept in the study's folder, `pieces/<N>.safetensors`, as tensors `<ablation>.<measure>` of
    shape [unit, prompt], with units in the order of the rows.

    Raises:
        ConfigurationError: a pattern matches nothing, or a kind of site does not exist in this model.
        TaskError: the task has no prompts for an ablation that was asked for.
    """

    name = "scan"
    Settings: ClassVar[type] = ScanSettings
    settings: ScanSettings
    level: Nodes

    def check(self) -> None:
        """Select the units."""
        super().check()
        settings = self.settings
        self.level, self.units = selected_units(
            self.model.config, settings.sites, settings.components, settings.dictionaries
        )
        self.choose_kinds(settings.ablations)

    def plan(self) -> list[Stage]:
        """The clean model, direct attribution and the statistics; then each missing piece under each ablation."""
        stages = [Stage("the clean model", self.task.n_test), Stage("direct attribution", self.task.n_test)]
        return stages + self.piece_stages(len(self.units))

    def run(self) -> Findings:
        """Measure every unit, and collect the findings."""
        clean = self.clean_behaviour()
        assert clean.identities is not None
        direct = self._direct(clean)
        behaviours = self.behaviours([(name,) for name in self.units], "units", clean)
        rows = list(self._rows(behaviours, clean, direct))
        figures: dict[str, Callable[[], Figure | None]] = {
            "maps": partial(self._maps, behaviours),
            "ranked": partial(self._ranked, rows),
            "gaps": partial(self._gaps, behaviours),
        }
        return Findings(
            rows,
            metrics={f"clean_{name}": value for name, value in estimates(clean).items()},
            facts={
                "n_units": len(self.units),
                "left_out": self.left_out,
                "agreement": self._agreement(behaviours),
            },
            shown=list(self._shown(rows, behaviours)),
            figures=figures,
            table="scan",
        )

    def _direct(self, clean: Behaviour) -> dict[str, Estimate | None]:
        """Direct logit attribution of each unit; None for units that do not write to the residual stream."""
        model, batches = self.model, counted(self.track, self.batches, "attributing the logit difference")
        terms = torch.cat([direct_attribution(model, batch.to(model.device), self.level).cpu() for batch in batches])
        by_unit = {name: terms[:, self.level.index(name)] for name in self.units}
        return {
            name: None if bool(values.isnan().any()) else estimate(values, clean.identities)
            for name, values in by_unit.items()
        }

    def _rows(
        self,
        behaviours: Mapping[AblationName, Behaviour],
        clean: Behaviour,
        direct: Mapping[str, Estimate | None],
    ) -> Iterator[Row]:
        tests = {
            kind: above(behaviour.kl, self.settings.threshold, self.settings.false_discovery_rate)
            for kind, behaviour in behaviours.items()
        }
        for index, name in enumerate(self.units):
            for kind, behaviour in behaviours.items():
                critical, adjusted = tests[kind]
                row = {"component": name, "ablation": kind, "total": ABLATION_KINDS[kind].total}
                row |= estimates(behaviour, index) | differences(behaviour, clean, index, 0, "clean")
                del row["kl_minus_clean"]
                if "optimal" in behaviours:
                    row |= differences(behaviour, behaviours["optimal"], index, index, "optimal")
                if direct[name] is not None:
                    row["direct_attribution"] = direct[name]
                yield row | {"critical": bool(critical[index]), "adjusted_p": float(adjusted[index])}

    def _agreement(self, behaviours: Mapping[AblationName, Behaviour]) -> list[dict[str, Any]]:
        """Rank correlation and ratios of all units' KL divergences, for each pair of ablations."""
        return [
            {
                "first": first,
                "second": second,
                "rank_correlation": rank_correlation(behaviours[first].kl, behaviours[second].kl).as_json(),
                "median_ratio": median_ratio(behaviours[first].kl, behaviours[second].kl).as_json(),
                "mean_ratio": mean_ratio(behaviours[first].kl, behaviours[second].kl).as_json(),
            }
            for number, first in enumerate(self.kinds)
            for second in self.kinds[number + 1 :]
        ]

    def _shown(self, rows: Sequence[Row], behaviours: Mapping[AblationName, Behaviour]) -> Iterator[Table | str]:
        n_units = len(self.units)
        title = most_listed(f"KL divergence in nats with one unit ablated, on {self.prompts}", n_units)
        direct = {row["component"]: row.get("direct_attribution") for row in rows}
        listed = alone_cells(rows, len(self.kinds))[:MOST_LISTED]
        yield Table(title, [cells | {"direct\nattribution": direct[cells["ablated"]]} for cells in listed])
        yield from self.left_out_lines()
        threshold = f"critical (above {self.settings.threshold:g} nats)"
        yield Table(
            f"All {n_units} units",
            [self._summary(kind, behaviours, rows, threshold) for kind in self.kinds],
        )

    def _summary(
        self, kind: AblationName, behaviours: Mapping[AblationName, Behaviour], rows: Sequence[Row], threshold: str
    ) -> dict[str, Any]:
        kl = behaviours[kind].kl
        cells = {
            "ablation": label(kind),
            "median KL": written(float(kl.mean(dim=1).median())),
            threshold: str(sum(row["critical"] for row in rows if row["ablation"] == kind)),
        }
        if "optimal" in behaviours and kind != "optimal":
            optimal = behaviours["optimal"].kl
            cells["optimal's KL over its,\nmedian (95 % interval)"] = str(median_ratio(optimal, kl))
            cells["rank correlation\nwith optimal"] = str(rank_correlation(optimal, kl))
        return cells

    def _maps(self, behaviours: Mapping[AblationName, Behaviour]) -> Figure:
        tables = {}
        for kind, behaviour in behaviours.items():
            scores = torch.full((len(self.level),), torch.nan)
            scores[[self.level.index(name) for name in self.units]] = behaviour.kl.mean(dim=1).float()
            laid_out = self.level.score_map(scores)
            tables[label(kind)] = laid_out.table.numpy()
        axes = laid_out.row_axis, laid_out.column_axis
        return effect_maps(tables, laid_out.rows, laid_out.columns, axes, f"{self.subject}: one unit ablated")

    def _ranked(self, rows: Sequence[Row]) -> Figure:
        panel = Panel("one unit ablated", list(self.units), kl_by_ablation(rows), ranked=True)
        return comparison_figure([panel], self.subject, {kind: label(kind) for kind in self.kinds})

    def _gaps(self, behaviours: Mapping[AblationName, Behaviour]) -> Figure | None:
        if "optimal" not in behaviours or len(behaviours) < 2:
            return None
        means = {kind: behaviour.kl.mean(dim=1).clamp(min=FLOOR).numpy() for kind, behaviour in behaviours.items()}
        ratios = {kind: np.asarray(values / means["optimal"]) for kind, values in means.items() if kind != "optimal"}
        return gap_figure(ratios, f"{self.subject}: {len(self.units)} units, each ablated alone")
