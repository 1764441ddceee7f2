"""Do lenses use the residual stream as the model does?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from scipy import stats

from oa_train.checks import check_at_least, check_positive
from oa_train.errors import ConfigurationError
from oa_train.figures.lenses import faithfulness_figure
from oa_train.figures.style import Figure
from oa_train.lenses.faithfulness import (
    BISECTIONS,
    Effects,
    Intervened,
    StreamStatistics,
    calibrated_step,
    layers_between,
    projected,
    resampled,
    steered,
)
from oa_train.lenses.lens import LENS_KINDS, AffineLens, Lens
from oa_train.lenses.predictions import Tokens
from oa_train.metrics.estimates import Estimate, estimate
from oa_train.progress import Stage, counted
from oa_train.shapes import Float, Tensor
from oa_train.studies.lens_study import LensStudy
from oa_train.studies.study import Findings, Row, Table, spoken

STEER, PROJECT, RESAMPLE = "steer", "project", "resample"
RANDOM, BASIS = "random", "basis"
MEASURED = ("magnitude", "similarity")

# Smaller effects, in nats, are rounding errors of float32, so logarithms are taken of no less than this.
SMALLEST_EFFECT = 1e-7

# Largest step that the calibration tries, in standard deviations of the residual stream along a direction.
LARGEST_STEP = 8.0


@dataclass(frozen=True)
class FaithfulnessSettings:
    """Settings of `faithfulness`.

    Attributes:
        lenses: kinds of lens; by default those that the runs have trained, and `logit` and `mean`.
        layers: layers at which the residual stream is changed; by default four of the lenses' layers.
        directions: number of random directions (from a normal distribution fitted to the stream), and of directions
            from each affine lens's own basis.
        subspace: dimension of the subspaces in which prompts exchange components.
        target: KL divergence in nats; the step is calibrated so that the model's mean effect along random directions
            is just below it.
        rows_per_run: maximum number of rows (changes times prompts) in one model run; limits memory without changing
            results.
    """

    lenses: list[str] | None = None
    layers: list[int] | None = None
    directions: int = 24
    subspace: int = 8
    target: float = 0.2
    rows_per_run: int = 128

    def __post_init__(self) -> None:
        check_positive(subspace=self.subspace, target=self.target, rows_per_run=self.rows_per_run)
        check_at_least(4, directions=self.directions)


class Faithfulness(LensStudy[FaithfulnessSettings]):
    """Changes the residual stream in the model and in the input of a lens: do predictions change in the same way?

    The stream is changed at a prompt's scored token in three ways: `steer` (a random step along a direction),
    `project` (its deviation from the mean along a direction is removed) and `resample` (its component in a subspace
    is replaced by the next prompt's). Rows: one for each lens, layer, change and set of directions, with `magnitude`,
    the correlation over directions of the logarithms of the two mean effects (over subspaces and prompts for
    `resample`), and `similarity`, the cosine similarity of the two changes in log probability (Li & Janson 2024,
    section 5).

    Raises:
        ConfigurationError: no run has trained a lens that was asked for, it lacks a layer that was asked for, or it is
            the resample lens.
        TaskError: the prompts are scored at several positions.
    """

    name = "faithfulness"
    Settings: ClassVar[type] = FaithfulnessSettings
    asks_of = "any"

    def check(self) -> None:
        """Choose the lenses and layers."""
        super().check()
        self.choose_layers(self.settings.layers)
        if self.settings.layers is None:
            self.layers = list(layers_between(self.layers, 4))
        self.choose_kinds(self.settings.lenses)
        if self.settings.lenses is None:
            self.kinds = [kind for kind in self.kinds if not LENS_KINDS[kind].needs_partners]
        for kind in self.kinds:
            if LENS_KINDS[kind].needs_partners:
                raise ConfigurationError(f"The {kind} lens also reads other prompts, so its effects are not its own.")
        if any(batch.scored.shape[1] > 1 for batch in self.batches):
            Intervened(self.model, self.batches[0], 0, 1)  # raises a TaskError with the reason

    def plan(self) -> list[Stage]:
        """Means if they are needed, statistics of the stream, and the changes at each layer."""
        n_changes = 2 * self.settings.directions + self.settings.directions // self.settings.subspace
        n_bases = 1 + sum(LENS_KINDS[kind].affine for kind in self.kinds)
        calibrating = BISECTIONS * self.settings.directions * len(self.batches[0])
        passes = self.task.n_test * n_changes * n_bases + calibrating
        statistics = Stage("statistics", self.task.n_means)
        return [*self.mean_stages, statistics, *[Stage(f"layer {n}", passes) for n in self.layers]]

    def run(self) -> Findings:
        """Change the stream at each chosen layer."""
        lenses, statistics, identities = self.lenses(), self._statistics(), self.identities
        rows, steps = list[Row](), dict[int, float]()
        for layer in self.layers:
            of_layer = {name: lens.at([layer]) for name, lens in lenses.items()}
            steps[layer], effects = self._at(layer, of_layer, statistics[layer])
            rows += [
                {"lens": name, "layer": layer, "change": change, "directions": directions}
                | {
                    "magnitude": _magnitude(change, of_change),
                    "similarity": estimate(of_change.similarity.mean(dim=0), identities),
                }
                for (name, change, directions), of_change in effects.items()
            ]
        return Findings(
            rows,
            facts={"layers": self.layers, "steps": {str(layer): step for layer, step in steps.items()}},
            shown=list(self._shown(rows)),
            figures={"faithfulness": partial(self._figure, rows)},
            table="faithfulness",
        )

    @torch.no_grad()
    def _statistics(self) -> dict[int, StreamStatistics]:
        batches = list(self.task.batches("means", self.task.n_means))
        streams: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        for batch in counted(self.track, batches, "statistics of the residual stream"):
            tokens = Tokens(self.model, batch.to(self.model.device))
            for layer, parts in streams.items():
                parts.append(tokens.residuals[layer].cpu())
        return {layer: StreamStatistics.of(torch.cat(parts)) for layer, parts in streams.items()}

    def _at(
        self, layer: int, lenses: Mapping[str, Lens], statistics: StreamStatistics
    ) -> tuple[float, dict[tuple[str, str, str], Effects]]:
        """The step at one layer, and the effects there by lens, change and set of directions."""
        settings, seed, device = self.settings, self.task.seed, self.model.device
        moved = [batch.to(device) for batch in self.batches]
        prompts = [Intervened(self.model, batch, layer, settings.rows_per_run) for batch in moved]
        sets = {(RANDOM, ""): statistics.random_directions(settings.directions, seed, layer)}
        for name, lens in lenses.items():
            if isinstance(lens, AffineLens):
                identity = torch.eye(lens.bias.shape[-1])
                sets[BASIS, name] = statistics.basis(lens.weight[0].cpu() + identity, settings.directions)
        deviation = float((statistics.factor.square().sum() / len(statistics.mean)).sqrt())
        with self.track(self.plan()[-1].passes, f"changing the stream of layer {layer}") as advance:

            def effect(step: float) -> float:
                first = prompts[0]
                changed = first.model_effects(steered(first.streams, random, step, seed, layer))
                advance(changed.numel())
                return float(changed.mean())

            random = sets[RANDOM, ""].to(device)
            step = calibrated_step(effect, settings.target, LARGEST_STEP * deviation)
            effects: dict[tuple[str, str, str], Effects] = {}
            for (kind, owner), directions in sets.items():
                readers = {owner: lenses[owner]} if owner else lenses
                for change, function in self._changes(directions.to(device), step, statistics, layer).items():
                    for name, of_lens in self._effects(prompts, readers, function, advance).items():
                        effects[name, change, kind] = of_lens
        return step, effects

    def _changes(
        self, directions: Float[Tensor, "direction d_model"], step: float, statistics: StreamStatistics, layer: int
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        mean = statistics.mean.to(directions.device)
        return {
            STEER: lambda streams: steered(streams, directions, step, self.task.seed, layer),
            PROJECT: lambda streams: projected(streams, directions, mean),
            RESAMPLE: lambda streams: resampled(streams, directions, self.settings.subspace),
        }

    def _effects(
        self,
        prompts: Sequence[Intervened],
        lenses: Mapping[str, Lens],
        change: Callable[[Tensor], Tensor],
        advance: Callable[[int], None],
    ) -> dict[str, Effects]:
        parts: dict[str, list[Effects]] = {name: [] for name in lenses}
        for of_batch in prompts:
            streams = change(of_batch.streams)
            logits = of_batch.logits(streams)
            advance(len(logits) * logits.shape[1])
            for name, lens in lenses.items():
                parts[name].append(of_batch.effects(lens, streams, logits))
        return {name: _joined(of_lens) for name, of_lens in parts.items()}

    def _shown(self, rows: Sequence[Row]) -> Iterator[Table]:
        for kind in (RANDOM, BASIS):
            cells: dict[tuple[int, str], dict[str, Any]] = {}
            for row in (row for row in rows if row["directions"] == kind):
                line = cells.setdefault(
                    (row["layer"], row["lens"]), {"layer": row["layer"], "lens": spoken(row["lens"])}
                )
                line |= {f"{row['change']}:\n{measure}": _brief(row[measure]) for measure in MEASURED}
            if cells:
                along = "random directions" if kind == RANDOM else "directions of each lens's own basis"
                yield Table(f"Model against lens along {along}, on {self.prompts}", list(cells.values()))

    def _figure(self, rows: Sequence[Row]) -> Figure:
        random = [row for row in rows if row["directions"] == RANDOM]
        panels = {
            (measure, change): {
                spoken(name): [row[measure] for row in random if row["lens"] == name and row["change"] == change]
                for name in dict.fromkeys(row["lens"] for row in random)
            }
            for measure in MEASURED
            for change in (STEER, PROJECT, RESAMPLE)
        }
        return faithfulness_figure(panels, self.layers, f"{self.subject}: causal faithfulness along random directions")


def _joined(parts: Sequence[Effects]) -> Effects:
    """Concatenate the effects on the prompts of all batches."""
    fields = (torch.cat([getattr(e, name).cpu() for e in parts], dim=1) for name in ("model", "lens", "similarity"))
    return Effects(*fields)


def _brief(value: Estimate) -> str:
    return f"{value.mean:.2f} [{value.ci95[0]:.2f}, {value.ci95[1]:.2f}]"


def _magnitude(change: str, effects: Effects) -> Estimate:
    """Pearson correlation of the logarithms of the two effects, with an interval from Fisher's transformation."""
    pairs = (effects.model, effects.lens)
    if change != RESAMPLE:
        pairs = (effects.model.mean(dim=1, keepdim=True), effects.lens.mean(dim=1, keepdim=True))
    model, lens = (values.double().flatten().clamp(min=SMALLEST_EFFECT).log().numpy() for values in pairs)
    if model.std() == 0 or lens.std() == 0:
        return Estimate(0.0, 1.0, (-1.0, 1.0), len(model))
    result = stats.pearsonr(model, lens)
    low, high = result.confidence_interval(0.95)
    r = float(result.statistic)
    return Estimate(r, (1 - r**2) / (len(model) - 3) ** 0.5, (float(low), float(high)), len(model))
