"""A growing share of a model ablated in order of importance: where does its behaviour break?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar, Literal

import torch

from oa_train.ablations.attribution import mask_gradients
from oa_train.ablations.base import Ablation
from oa_train.ablations.fitting import RefitSettings, fit_passes
from oa_train.ablations.registry import ABLATION_KINDS, AblationName, AblationSource, check_kind, check_suits
from oa_train.checks import check_at_least, check_choice
from oa_train.errors import ConfigurationError
from oa_train.figures.curves import curve_figure
from oa_train.figures.style import Figure
from oa_train.metrics.estimates import Estimate
from oa_train.metrics.measures import Loss, check_loss
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.levels import Level
from oa_train.models.sites import DEFAULT_SITES, check_dictionaries
from oa_train.progress import WITH_GRADIENTS, Stage
from oa_train.shapes import Bool, Float, Tensor
from oa_train.studies.ablation_study import AblationStudy
from oa_train.studies.curve_tables import (
    MeasuredCurve,
    chosen_points,
    numbers_ablated,
    point_cells,
    pooled,
    summary_cells,
)
from oa_train.studies.options import check_ablations, check_positions, n_positions, patterns_of, selected_units
from oa_train.studies.rankings import (
    ATTRIBUTION,
    BUILT_IN,
    RANDOM,
    SCORES,
    Ranking,
    check_names,
    keep_probabilities,
    random_order,
    ranking_of_path,
    told_apart,
)
from oa_train.studies.study import Findings, Table, estimates, spoken, statistics_stages


@dataclass(frozen=True)
class CurveSettings:
    """Settings of `curve`.

    Attributes:
        sites: kinds of site whose units are ablated; by default those of the run's circuit, else heads and MLPs.
        components: shell patterns of the units that are ablated (`a*.h*`, `!m0`), also at a span (`m*@S2`); by default
            those that the run was free to ablate, else all.
        dictionaries: sparse autoencoders, whose features are the units of the kind `features`.
        rankings: `scores`, the keep-probabilities of the run's circuit; `attribution`, the first-order effect of
            ablating each unit; `random`; or the path of the folder of a finished scan, or of a CSV file with the
            columns `component` and `score`. By default scores if the run has them, attribution and random.
        ranked_under: ablation whose replacements attribution uses (by default mean), and whose KL divergences are
            taken from a scan (by default optimal).
        attribution_loss: loss that attribution differentiates, `cross_entropy` or `logit_difference`.
        random_orders: number of random orders over which `random` is averaged.
        fractions: shares of the units that are ablated; 0 and 1 are always added.
        sizes: numbers of units that are kept, instead of `fractions`.
        order: whether to ablate the `least` or the `most` important units first.
        ablations: kinds of ablation; by default all for which the task has prompts.
        positions: number of positions with their own constants: 1 pools all positions, `every` is as many as the
            prompts have; by default that of the run, else 1.
        refit: whether to train optimal constants for every point. Otherwise all points share one set: the constants of
            the run, or else constants trained with all selected units ablated.
        fit: training of these constants.
        broken_by: measure that decides where the curve breaks: `kl`, in nats, or the drop in `accuracy`.
        bound: value of `broken_by` above which the curve breaks.
    """

    sites: list[str] | None = None
    components: str | list[str] | None = None
    dictionaries: list[DictionarySpec] = field(default_factory=list)
    rankings: list[str] | None = None
    ranked_under: AblationName | None = None
    attribution_loss: Loss = "cross_entropy"
    random_orders: int = 3
    fractions: list[float] = field(default_factory=lambda: [tenth / 10 for tenth in range(11)])
    sizes: list[int] | None = None
    order: Literal["least", "most"] = "least"
    ablations: list[AblationName] | None = None
    positions: int | Literal["every"] | None = None
    refit: bool = True
    fit: RefitSettings = field(default_factory=lambda: RefitSettings(steps=100, batch_size=8, evaluate_every=25))
    broken_by: Literal["kl", "accuracy"] = "kl"
    bound: float = 0.1

    def __post_init__(self) -> None:
        check_positions(self.positions)
        check_ablations(self.ablations)
        check_dictionaries(self.sites or DEFAULT_SITES, len(self.dictionaries))
        if self.rankings is not None:
            check_names(self.rankings)
        if self.ranked_under is not None:
            check_kind("ranked_under", self.ranked_under)
        check_loss("attribution_loss", self.attribution_loss)
        if self.attribution_loss == "kl":
            raise ConfigurationError(
                "attribution_loss is 'kl', whose gradient is zero where everything is kept. Choose cross_entropy or "
                "logit_difference."
            )
        check_at_least(1, random_orders=self.random_orders)
        check_at_least(0, bound=self.bound)
        for fraction in self.fractions:
            if not 0 <= fraction <= 1:
                raise ConfigurationError(f"fractions names {fraction}; expected shares between 0 and 1.")
        check_choice("order", self.order, ("least", "most"))
        check_choice("broken_by", self.broken_by, ("kl", "accuracy"))


class Curve(AblationStudy[CurveSettings]):
    """Ablates a growing share of the selected units in order of importance: where does behaviour break?

    Units that are not selected are kept. The first point, nothing ablated, is the clean model; the last one, all
    selected units ablated, is the same for all rankings.

    Rows: one for each ranking (and `draw` of a random one), fraction and ablation, with the measures and their paired
    differences from the clean model (`x_minus_clean`). Metrics: for each ranking and ablation, the area under the
    curve of the KL divergence over the fraction (`<ranking>_<ablation>_kl_area`), the area under the recovery of the
    logit difference (`..._recovery_area`), and the last fraction before the bound is exceeded (`..._holds_until`).

    Raises:
        ConfigurationError: a pattern matches nothing, a ranking or size is invalid, or the ranking by scores or the
            ablation of the attribution needs a run.
        ArtefactError: a stored ranking was made for another model or for other units.
        TaskError: the task has no prompts for an ablation that was asked for.
    """

    name = "curve"
    Settings: ClassVar[type] = CurveSettings
    asks_of = "optional"

    def check(self) -> None:
        """Select the units, read stored rankings, and choose the points."""
        super().check()
        settings = self.settings
        self.trained = self.circuits[0] if self.circuits else None
        self.level, self.parts = self._selection()
        if not self.parts:
            raise ConfigurationError(f"components is {settings.components}, which selects no unit.")
        self.choose_kinds(settings.ablations)
        has_scores = self.trained is not None and self.trained.circuit.scores is not None
        self.rankings = settings.rankings or [name for name in BUILT_IN if name != SCORES or has_scores]
        self.ranked_under = settings.ranked_under or "mean"
        if ATTRIBUTION in self.rankings:
            check_suits([self.ranked_under], AblationSource(self.model, self.task, self.level), self.batches)
            if ABLATION_KINDS[self.ranked_under].learned and self._own_constants is None:
                raise ConfigurationError(
                    f"ranked_under is {self.ranked_under}, but there is no run whose constants attribution could use. "
                    "Give --run, or choose another ablation."
                )
        assert self._stored is not None  # read now, so that an unsuitable ranking fails before any computation
        self.ablated = numbers_ablated(len(self.parts), settings.fractions, settings.sizes)

    def _selection(self) -> tuple[Level, tuple[str, ...]]:
        settings = self.settings
        if self.trained is not None and settings.sites is None and not settings.dictionaries:
            level, own = self.trained.circuit.level, self.trained.selected
            return level, level.select(own if settings.components is None else patterns_of(settings.components))
        components = "*" if settings.components is None else settings.components
        return selected_units(self.model.config, settings.sites or DEFAULT_SITES, components, settings.dictionaries)

    @cached_property
    def _stored(self) -> dict[str, Ranking]:
        """Rankings that can be read without running the model, by their name in the settings."""
        stored = {}
        for name in self.rankings:
            if name == SCORES:
                stored[name] = keep_probabilities(self.trained, self.level, self.parts)
            elif name not in BUILT_IN:
                under = self.settings.ranked_under
                stored[name] = ranking_of_path(name, self.level, self.parts, self.fingerprint, under)
        return told_apart(stored)

    @property
    def _n_circuits(self) -> int:
        """Number of circuits: the one with everything ablated, and the intermediate points of each order."""
        n_orders = len(self.rankings) + (self.settings.random_orders - 1 if RANDOM in self.rankings else 0)
        return 1 + n_orders * (len(self.ablated) - 2)

    @property
    def _own_constants(self) -> Ablation | None:
        """The run's learned constants, if they belong to this level."""
        trained = self.trained
        if trained is None or trained.constants is None or not ABLATION_KINDS[trained.ablation].learned:
            return None
        return trained.constants.of_level(self.level) if self.level == trained.circuit.level else None

    def plan(self) -> list[Stage]:
        """The clean model, the statistics and attribution; then all points under each ablation."""
        task, with_attribution = self.task, ATTRIBUTION in self.rankings
        needed = [*self.kinds, self.ranked_under] if with_attribution else self.kinds
        stages = [Stage("the clean model", task.n_test), *statistics_stages(needed, task)]
        stages += [Stage("attribution", WITH_GRADIENTS * task.n_validation)] if with_attribution else []
        n_fitted = self._n_circuits if self.settings.refit else int(self._own_constants is None)
        passes = fit_passes(n_fitted, self.settings.fit, task.n_validation, 1)
        return stages + self.stages_under_each(self._n_circuits, passes)

    def run(self) -> Findings:
        """Evaluate all points under each ablation."""
        clean = self.clean_behaviour()
        assert self.prepared  # the statistics are gathered before the stages that use them
        orders = self._orders()
        masks, curves, n_between = self._masks(orders), list[MeasuredCurve](), len(self.ablated) - 2
        constants, rows_per_run = partial(self._constants, masks), self.settings.fit.rows_per_run
        for kind, behaviour in self.under_each(masks, constants, "curves", rows_per_run).items():
            for number, order in enumerate(orders):
                points = [*range(1 + number * n_between, 1 + (number + 1) * n_between), 0]
                curves.append(MeasuredCurve(order.name, order.draw, kind, chosen_points(behaviour, points, clean)))
        drawn = pooled(curves)
        summaries = [curve.summary(self._fractions, self.settings.broken_by, self.settings.bound) for curve in drawn]
        metrics = {f"clean_{name}": value for name, value in estimates(clean).items()}
        for curve, summary in zip(drawn, summaries, strict=True):
            metrics |= {f"{curve.ranking}_{curve.ablation}_{name}": value for name, value in summary.items()}
        return Findings(
            [row for curve in curves for row in curve.rows(self.ablated)],
            metrics=metrics,
            facts={
                "n_units": len(self.parts),
                "left_out": self.left_out,
                "rankings": [
                    {"name": order.name, "draw": order.draw, "ascending": order.names(self.parts)} for order in orders
                ],
            },
            shown=list(self._shown(drawn, summaries)),
            figures={"curve": partial(self._figure, drawn)},
            table="curve",
        )

    def _shown(
        self, curves: Sequence[MeasuredCurve], summaries: Sequence[Mapping[str, Estimate]]
    ) -> Iterator[Table | str]:
        settings, first = self.settings, self.kinds[0]
        yield Table(
            f"KL divergence in nats with {self._which} ablated by {spoken(first)} ablation, on {self.prompts}",
            point_cells([curve for curve in curves if curve.ablation == first], self.ablated),
        )
        unit = "nats of KL" if settings.broken_by == "kl" else "accuracy lost"
        holds = f"holds until\n{settings.bound:g} {unit}"
        yield Table(f"Curves with {self._which} first, 95 % intervals", summary_cells(curves, summaries, holds))
        yield from self.left_out_lines()
        if RANDOM in self.rankings and settings.random_orders > 1:
            yield f"random is the mean over {settings.random_orders} orders; tables/curve.csv has each of them."

    @property
    def _which(self) -> str:
        """Description of the units that are ablated first, for titles."""
        return f"the {self.settings.order} important of {len(self.parts):,} {self.level.parts}"

    def _figure(self, curves: Sequence[MeasuredCurve]) -> Figure:
        settings = self.settings
        refit = (
            ", constants refitted"
            if settings.refit and any(ABLATION_KINDS[kind].learned for kind in self.kinds)
            else ""
        )
        title = f"{self.subject}: {len(self.parts):,} {self.level.parts} ablated together{refit}"
        bound = settings.bound if settings.broken_by == "kl" and settings.bound > 0 else None
        drawn = [curve.drawn() for curve in curves]
        return curve_figure(drawn, self._fractions.tolist(), title, f"the {settings.order}", bound)

    @property
    def positions(self) -> int:
        """Number of positions with their own constants."""
        own = 1 if self.trained is None or self._own_constants is None else self.trained.positions
        return n_positions(self.settings.positions or own, self.batches)

    @property
    def _fractions(self) -> Float[Tensor, " point"]:
        return torch.tensor(self.ablated, dtype=torch.float64) / len(self.parts)

    @cached_property
    def _entries(self) -> Tensor:
        """Indices of the units in the mask."""
        return torch.tensor([self.level.index(name) for name in self.parts])

    def _orders(self) -> list[Ranking]:
        orders = []
        for name in self.rankings:
            if name == ATTRIBUTION:
                orders.append(self._attribution())
            elif name == RANDOM:
                draws = range(1, self.settings.random_orders + 1)
                orders += [random_order(len(self.parts), self.task.seed, draw) for draw in draws]
            else:
                orders.append(self._stored[name])
        return orders

    def _attribution(self) -> Ranking:
        """Ranking by the mean absolute first-order effect on the validation prompts."""
        kind = ABLATION_KINDS[self.ranked_under]
        own = self._own_constants if kind.learned else None
        ablation = kind.prepare(self.source) if own is None else own
        batches, loss = list(self.task.batches("validation", self.task.n_validation)), self.settings.attribution_loss
        with self.track(WITH_GRADIENTS * self.task.n_validation, "attribution") as advance:
            rows_per_run = self.settings.fit.rows_per_run
            gradients = mask_gradients(self.model, batches, self.level, ablation, loss, rows_per_run, advance)
        return Ranking(ATTRIBUTION, gradients[:, self._entries].abs().double().mean(dim=0))

    def _masks(self, orders: Sequence[Ranking]) -> Bool[Tensor, "circuit entry"]:
        """Masks with everything ablated, then at the intermediate points of each order."""
        masks = torch.ones(self._n_circuits, len(self.level), dtype=torch.bool)
        masks[0, self._entries] = False
        row = 1
        for order in orders:
            first = order.ascending if self.settings.order == "least" else order.ascending.flip(0)
            for number in self.ablated[1:-1]:
                masks[row, self._entries[first[:number]]] = False
                row += 1
        return masks

    def _constants(self, masks: Bool[Tensor, "circuit entry"]) -> Sequence[Ablation]:
        """Learned constants of each point, or one set for all of them."""
        if self.settings.refit:
            return self.fitted_constants(masks, self.settings.fit, "all points")
        if self._own_constants is not None:
            return [self._own_constants]
        return self.fitted_constants(masks[:1], self.settings.fit, "everything ablated")
