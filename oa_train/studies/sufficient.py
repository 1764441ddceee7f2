"""Sufficient sets: few units that by themselves reach a stated recovery of the model's behaviour."""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import ClassVar

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import Behaviour, CleanLogits, circuit_behaviour, clean_behaviour
from oa_train.ablations.fitting import fit_passes
from oa_train.ablations.registry import check_kind
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError
from oa_train.metrics.estimates import Estimate, written
from oa_train.models.levels import Level
from oa_train.models.sites import DEFAULT_SITES
from oa_train.progress import Stage, counted
from oa_train.shapes import Bool, Float, Tensor
from oa_train.studies.ablation_study import AblationStudy
from oa_train.studies.findings import listed
from oa_train.studies.greedy import Budget, GreedySearch, Step
from oa_train.studies.options import patterns_of, selected_units
from oa_train.studies.path_tables import (
    TIE_BREAK,
    evenly,
    path_figure,
    recoveries,
    searched,
    searched_lines,
    step_cells,
    step_rows,
)
from oa_train.studies.study import MOST_LISTED, Findings, Row, Table, estimates, spoken, statistics_stages
from oa_train.studies.sufficient_settings import SufficientSettings as SufficientSettings


class Sufficient(AblationStudy[SufficientSettings]):
    """Finds a small set of units that by itself reaches a stated recovery of the model's behaviour.

    Units are restored until the set is sufficient on the validation prompts, then removed while it stays sufficient.
    Steps of the search are then evaluated on the test prompts. Under `optimal` the search uses fixed constants, those
    of the run or the means; afterwards constants are trained for the final set.

    Rows: one for each step of the search, with the units that it moved, the recovery on the validation prompts and, if
    the step was evaluated, the recovery and all measures on the test prompts (`trained_x` with constants trained for
    the set).

    Raises:
        ConfigurationError: nothing is selected, the run's circuit is an edge circuit or has other sites, or ablating
            the whole selection does not worsen the measure.
        TaskError: the task has no prompts for the ablation.
    """

    name = "sufficient"
    Settings: ClassVar[type] = SufficientSettings
    asks_of = "optional"

    def check(self) -> None:
        """Select the units."""
        super().check()
        settings = self.settings
        self.start = self.circuits[0] if self.circuits else None
        patterns = patterns_of(settings.components)
        self.level = self._level(patterns)
        self.free = self.level.selected(patterns)
        if self.start is not None:
            self.free &= self.level.selected(self.start.selected)
        if not self.free.any():
            raise ConfigurationError(f"components is {patterns}, which selects no unit that may be ablated.")
        own = "optimal" if self.start is None else self.start.ablation
        self.kind = check_kind("ablation", settings.ablation or own)
        self.choose_kinds([self.kind.name])
        self._own = self._own_constants()

    def _level(self, patterns: list[str]) -> Level:
        settings = self.settings
        if self.start is None:
            return selected_units(self.model.config, settings.sites, patterns, settings.dictionaries)[0]
        level = self.start.circuit.level
        if not level.has_one_stream:
            raise ConfigurationError(
                f"{self.start.name} is a circuit of {level.parts}, and sufficient moves single units: almost no "
                "edge does anything without others on its path, so a greedy search cannot start. "
                "minimal tests each edge of a circuit; fit with --model.level edges finds edge circuits."
            )
        kinds, _ = level.entry_kinds
        if settings.sites != [*DEFAULT_SITES] and set(settings.sites) != set(kinds):
            raise ConfigurationError(
                f"sites is {settings.sites}, but the circuit of {self.start.name} has {', '.join(kinds)}. "
                "Leave sites out, or leave --run out and name the model with --lm.name."
            )
        return level

    @property
    def positions(self) -> int:
        """Number of positions with their own constants."""
        return self.settings.positions or super().positions

    @cached_property
    def ablation(self) -> Ablation:
        """Ablation used by the search; fixed constants for a learned ablation."""
        return self.kind.prepare(self.source) if self._own is None else self._own

    def _own_constants(self) -> Constants | None:
        """The run's constants, if it was trained under this ablation.

        Raises:
            ConfigurationError: they distinguish more positions than `positions`.
        """
        if self.start is None or self.start.constants is None or self.start.ablation != self.kind.name:
            return None
        return self.start.constants.of_level(self.level).with_positions(self.positions)

    @property
    def _n_search(self) -> int:
        return min(self.settings.search_prompts, self.task.n_validation)

    def plan(self) -> list[Stage]:
        """The statistics and the clean model; then a search that moves every unit, its curve and the constants."""
        settings, task = self.settings, self.task
        kinds = [self.kind.name] if self.kind.learned or self._own is None else []
        stages = [*statistics_stages(kinds, task), Stage("the clean model", self._n_search)]
        stages += [Stage("the search", self._most_circuits * self._n_search), Stage("the clean model", task.n_test)]
        n_points = min(settings.curve_points, 1 + self._most_steps)
        stages.append(Stage("the curve", (1 + n_points) * task.n_test))
        if self.kind.learned:
            n_fitted = 2 + (-(-n_points // settings.fit_every) if settings.fit_every else 0)
            passes = fit_passes(n_fitted, settings.fit, task.n_validation, 2)
            stages += [Stage("constants", passes), Stage("the sets", n_fitted * task.n_test)]
        return stages

    @property
    def _n_movable(self) -> int:
        """Number of units that the search may move in its first direction."""
        return int((self._first & self.free if self.settings.direction == "remove" else self.free).sum())

    @property
    def _most_steps(self) -> int:
        return -(-self._n_movable // self.settings.at_once)

    @property
    def _most_circuits(self) -> int:
        """Number of circuits evaluated if the search moves every unit and each round's first candidates succeed."""
        n_units, settings = self._n_movable, self.settings
        tried = min(settings.candidates, n_units) + settings.at_once.bit_length() - 1
        first = n_units if self._scores is None else tried
        return 2 + first + (self._most_steps - 1) * tried + 2 * settings.pairs

    def announce(self, stages: Sequence[Stage]) -> None:
        """Announce the cost of a search that moves every unit, and how candidates are screened."""
        super().announce(stages)
        settings, n_units = self.settings, self._n_movable
        tried = min(settings.candidates, n_units)
        line = f"the search may move {n_units:,} units and tries {tried} a round on {self._n_search} prompts"
        if tried < n_units:
            first = "all in the first one" if self._scores is None else "first by the run's keep-probabilities"
            line += f", {first}, then those that did best when last tried"
        self.track.say(f"{line}; the cost is that of moving all, but the search ends at {settings.recovery:g}")

    @property
    def _scores(self) -> Float[Tensor, " entry"] | None:
        return None if self.start is None else self.start.circuit.scores

    @property
    def _first(self) -> Tensor:
        """The set that the search starts from."""
        if self.settings.direction == "restore":
            return ~self.free
        return torch.ones_like(self.free) if self.start is None else self.start.circuit.mask | ~self.free

    def run(self) -> Findings:
        """Search on the validation prompts, and evaluate on the test prompts."""
        _ = self.ablation  # the statistics are gathered before the stages that use them
        if self.kind.learned:
            _ = self.source.mean
        steps, fit = self._search(), self.settings.fit
        clean = self.clean_behaviour()
        points = evenly(len(steps), self.settings.curve_points)
        masks = self._beside_nothing(steps, points)
        curve = self.behaviour(self.level, masks, [self.ablation], "the sets on test prompts", fit.rows_per_run)
        measured, constants = {"": (points, curve)}, None
        if self.kind.learned:
            assert isinstance(self.ablation, Constants)
            stride = self.settings.fit_every
            fitted = sorted({*(points[::stride] if stride else ()), len(steps) - 1})
            masks = self._beside_nothing(steps, fitted)
            sets = self.fitted_constants(masks, fit, "sets", starts=[self.ablation])
            described, constants = "sets with constants of their own", sets[-1]
            measured["trained_"] = fitted, self.behaviour(self.level, masks, sets, described, fit.rows_per_run)
        rows = list(step_rows(steps, self.level, self.free, clean, measured, self.settings.measure))
        trained_set = self._trained_set(steps[-1], constants)
        metrics = {f"clean_{name}": value for name, value in estimates(clean).items()}
        metrics |= {f"nothing_{name}": value for name, value in estimates(curve).items()}
        metrics |= {name: value for name, value in rows[-1].items() if isinstance(value, Estimate)}
        measure = spoken(self.settings.measure).replace("kl", "KL divergence")
        labels = f"units kept, of {int(self.free.sum()):,}", f"recovery ({measure})"
        title = f"{self.subject}: all other units under {spoken(self.kind.name)} ablation"
        return Findings(
            rows,
            metrics=metrics,
            facts={
                "ablation": self.kind.name,
                "names": list(self.level.kept(steps[-1].mask & self.free)),
                "n_units": int(self.free.sum()),
                "search": searched(steps, self._n_search, self._tried_in_vain),
            },
            shown=list(self._shown(rows, steps)),
            figures={"recovery": partial(path_figure, rows, self.settings.recovery, *labels, title)},
            circuit=trained_set.circuit.counts(),
            trained=trained_set,
            table="steps",
        )

    def _search(self) -> list[Step]:
        settings, n_prompts = self.settings, self._n_search
        batches, logits = list(self.task.batches("validation", n_prompts)), CleanLogits(self.model)
        shown = counted(self.track, batches, "running the clean model on validation prompts")
        clean = clean_behaviour(self.model, shown, logits)
        most = self._most_circuits * n_prompts

        with self.track(most, "searching on validation prompts") as advance:

            def within(more: int) -> None:
                nonlocal most
                more, most = min(more, most), most - min(more, most)
                advance(more)

            def behaviour(masks: Tensor) -> Behaviour:
                rows = settings.fit.rows_per_run
                return circuit_behaviour(self.model, batches, self.level, masks, [self.ablation], rows, logits, within)

            nothing = behaviour(~self.free.unsqueeze(0))
            self._check_gap(clean, nothing)

            def measure(masks: Tensor) -> Tensor:
                return recoveries(behaviour(masks), clean, nothing, settings.measure)

            budget = Budget(settings.candidates, settings.at_once, settings.pairs, settings.least_gain)
            search = GreedySearch(measure, self.free, settings.recovery, budget, self._scores)
            steps = search.run(self._first)
            self._tried_in_vain = search.tried_in_vain
        return steps

    def _check_gap(self, clean: Behaviour, nothing: Behaviour) -> None:
        name = self.settings.measure
        of_clean, of_nothing = (float(getattr(behaviour, name)[0].mean()) for behaviour in (clean, nothing))
        gap = of_nothing if name == "kl" else of_clean - of_nothing
        if not gap > TIE_BREAK:
            raise ConfigurationError(
                f"The {spoken(name)} is {written(of_clean)} for the clean model and {written(of_nothing)} with all "
                f"{int(self.free.sum())} units under {spoken(self.kind.name)} ablation: there is nothing to recover. "
                "Choose another measure, ablation or task."
            )

    def _beside_nothing(self, steps: Sequence[Step], points: Sequence[int]) -> Bool[Tensor, "circuit entry"]:
        """Everything ablated, then the sets of these steps."""
        return torch.stack([~self.free, *(steps[point].mask for point in points)])

    def _trained_set(self, last: Step, constants: Constants | None) -> TrainedCircuit:
        """The set as a circuit, with its constants if the ablation has any."""
        task, settings = self.task, self.settings
        searched_for = {
            "direction": settings.direction,
            "recovery": settings.recovery,
            "measure": settings.measure,
        }
        provenance = {
            "model": task.lm.name,
            "revision": task.lm.revision,
            "family": self.model.config.model_type,
            "fingerprint": self.fingerprint,
            "task": task.describe(),
            "bos_token_id": task.bos_token_id,
            "seed": task.seed,
            "ablation": self.kind.name,
            "loss": "kl",
            "selected": list(self.level.kept(self.free)),
            "training": {"positions": self.source.slots.positions, "study": self.name, **searched_for},
        }
        fixed = self.ablation if self.kind.constant and isinstance(self.ablation, Constants) else None
        constants = constants or fixed
        if constants is not None:
            constants = Constants(constants.to("cpu").tables, constants.slots, provenance)
        circuit = Circuit.from_mask(self.level, last.mask, provenance=provenance)
        return TrainedCircuit(self.name, circuit, constants)

    def _shown(self, rows: Sequence[Row], steps: Sequence[Step]) -> Iterator[Table | str]:
        last, settings = rows[-1], self.settings
        measured = [row for row in rows if "recovery" in row]
        shown = [measured[number] for number in evenly(len(measured), MOST_LISTED)]
        of = f"of the {spoken(settings.measure)}" if settings.measure != "kl" else "in KL divergence"
        title = (
            f"{last['size']} of {int(self.free.sum()):,} units, which recover {settings.recovery:g} {of} under "
            f"{spoken(self.kind.name)} ablation of the others\nMeasured on {self.prompts}, with 95 % intervals"
        )
        if len(shown) < len(rows):
            title += f"; {len(shown)} of {len(rows)} steps"
        yield Table(title, [step_cells(row) for row in shown])
        names = self.level.kept(steps[-1].mask & self.free)
        yield f"set: {listed(names, MOST_LISTED)}"
        yield from searched_lines(searched(steps, self._n_search, self._tried_in_vain), settings.pairs)
        if "trained_recovery" in last:
            yield f"with constants trained for the set and for everything ablated: recovery {last['trained_recovery']}"
        if last["recovery"].ci95[1] < settings.recovery:
            yield f"On the test prompts it recovers less than {settings.recovery:g}: raise search_prompts."
