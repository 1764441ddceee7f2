"""Units ablated together: their joint effect compared with the sum of their single effects."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import combinations
from typing import Any, ClassVar

import torch

from oa_train.ablations.evaluation import Behaviour
from oa_train.ablations.registry import AblationSource, check_suits
from oa_train.errors import ConfigurationError
from oa_train.figures.style import Figure
from oa_train.metrics.estimates import estimate
from oa_train.metrics.measures import LOSS_SIGNS, Loss
from oa_train.metrics.ranks import beyond
from oa_train.progress import Stage
from oa_train.shapes import Float, Tensor
from oa_train.studies.interact_settings import InteractSettings as InteractSettings
from oa_train.studies.interaction_view import InteractionView
from oa_train.studies.joint import Joint, n_screened, ranked_units, screening_line
from oa_train.studies.options import patterns_of, selected_units
from oa_train.studies.pieces import Piece, Pieces
from oa_train.studies.rankings import effects_of_scan
from oa_train.studies.study import Findings, Study, estimates
from oa_train.studies.unit_ablations import UnitAblations, gathered


class Interact(Study[InteractSettings]):
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
    resumable = True

    def check(self) -> None:
        """Select the units, pairs, groups and the primary set."""
        super().check()
        settings = self.settings
        patterns, primary = patterns_of(settings.components), patterns_of(settings.primary)
        pairs = settings.pairs if isinstance(settings.pairs, list) else []
        named = [name for names in (*pairs, *settings.groups) for name in names]
        all_patterns = [*patterns, *primary, *named]
        self.level, _ = selected_units(self.model.config, settings.sites, all_patterns, settings.dictionaries)
        self.units, self.primary = self.level.select(patterns), self.level.select(primary)
        if len(self.units) < 1 + settings.all_pairs:
            raise ConfigurationError(
                f"components {patterns} selects {' '.join(self.units) or 'no unit'}; expected at least "
                f"{'two units, of which pairs are made' if settings.all_pairs else 'one unit'}."
            )
        self.joints = [Joint.pair(self.level, *pair) for pair in pairs]
        self.joints += [Joint.group(self.level, group) for group in settings.groups]
        others = [name for name in self.units if name not in self.primary] if primary else []
        if primary and not others:
            raise ConfigurationError(
                f"primary {primary} contains all {len(self.units)} selected units, so that no effect can grow. Select "
                "more components, or a smaller primary set."
            )
        self.conditionals = [Joint("conditional", (self.primary, (name,))) for name in others]
        check_suits([settings.ablation], AblationSource(self.model, self.task, self.level), self.batches)
        self.n_paired = n_screened(len(self.units), settings.most_pairs) if settings.all_pairs else 0
        self.scanned = (
            effects_of_scan(settings.scan, self.level, self.units, self.fingerprint, settings.ablation)
            if settings.scan is not None and settings.all_pairs
            else None
        )
        self.singles = self._singles()

    def _singles(self) -> tuple[str, ...]:
        """Units that are ablated alone, in mask order."""
        single = {name for joint in (*self.joints, *self.conditionals) for name in joint.alone}
        if self.scanned is not None:
            single |= set(ranked_units(self.scanned, self.n_paired))
        elif self.settings.all_pairs:
            single |= set(self.units)
        return self.level.kept(self.level.mask(sorted(single)))

    @property
    def _n_sets(self) -> int:
        """Number of sets of several units that are ablated together."""
        pairs = self.n_paired * (self.n_paired - 1) // 2
        return pairs + len(self.joints) + len(self.conditionals) + (len(self.primary) > 1)

    def plan(self) -> list[Stage]:
        """The clean model and the statistics; then the pieces of single units, and those of sets."""
        stages, settings = [Stage("the clean model", self.task.n_test)], self.settings
        sizes = [*_sizes(len(self.singles), settings.parts_at_once), *_sizes(self._n_sets, settings.parts_at_once)]
        missing = self.pieces.missing(len(sizes))
        return stages + self._ablations.stages([sizes[number] for number in missing])

    @cached_property
    def pieces(self) -> Pieces:
        """Measured pieces, stored in the study's folder if it has one."""
        return self._ablations.pieces(self.singles)

    def run(self) -> Findings:
        """Measure single units, choose the pairs, measure the sets, and compare."""
        clean = self.clean_behaviour()
        alone = self._measured([(name,) for name in self.singles], "single units", clean, 0)
        effects = dict(
            zip(self.singles, _effects(alone, clean, self.settings.effect).mean(dim=1).tolist(), strict=True)
        )
        ranking = self.scanned if self.scanned is not None else {name: effects[name] for name in self._ranked}
        paired = ranked_units(ranking, self.n_paired)
        joints = [Joint("pair", ((first,), (second,))) for first, second in combinations(self._in_order(paired), 2)]
        joints += self.joints
        questions = [*joints, *self.conditionals]
        sets = [self.primary] * (len(self.primary) > 1) + [joint.units for joint in questions]
        n_alone = len(_sizes(len(self.singles), self.settings.parts_at_once))
        together = self._measured(sets, "sets of units", clean, n_alone)
        rows = list(self._rows(questions, sets, alone, together, clean))
        first = sorted(rows[: len(joints)], key=lambda row: -abs(row[self.settings.interaction].mean))
        grown = sorted(rows[len(joints) :], key=lambda row: -row[self.settings.interaction].mean)
        single = {name: estimate(values, clean.identities) for name, values in self._values(alone, clean).items()}
        screened = screening_line(ranking, paired, None if self.scanned is None else self.settings.ablation)
        view = InteractionView(self.settings, self.level, self.primary, self.subject, self.prompts)
        figures: dict[str, Callable[[], Figure | None]] = {}
        if joints:
            figures |= {"pairs": partial(view.map, first, single), "ranked": partial(view.bars, first)}
        if grown:
            figures["conditional"] = partial(view.bars, grown)
        return Findings(
            [*first, *grown],
            metrics={f"clean_{name}": value for name, value in estimates(clean).items()},
            facts={
                "ablation": self.settings.ablation,
                "effect": self.settings.effect,
                "primary": list(self.primary),
                "alone": single,
                "screened_out": [name for name in ranking if name not in paired],
            },
            shown=[*view.shown(first), *([screened] if screened else []), *view.shown(grown)],
            figures=figures,
            table="interactions",
        )

    @property
    def _ranked(self) -> Sequence[str]:
        """Units whose single effects determine which of them are paired."""
        return self.units if self.settings.all_pairs else ()

    def _in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        return self.level.kept(self.level.mask([*names]))

    @cached_property
    def _ablations(self) -> UnitAblations:
        settings = self.settings
        return UnitAblations(self, self.level, [settings.ablation], settings.fit, settings.positions)

    def _measured(self, sets: Sequence[Sequence[str]], described: str, clean: Behaviour, first: int) -> Behaviour:
        """Behaviour with each set ablated, measured in pieces numbered from `first`."""
        at_once = self.settings.parts_at_once

        def measure(number: int) -> Piece:
            start = (number - first) * at_once
            masks = torch.stack([~self.level.mask(names) for names in sets[start : start + at_once]])
            return self._ablations.measured(masks, f"{described} {start + 1} to {start + len(masks)}")

        n_pieces = len(_sizes(len(sets), at_once))
        return gathered(list(self.pieces.all(first + n_pieces, measure, first)), self.settings.ablation, clean)

    def _values(self, alone: Behaviour, clean: Behaviour) -> dict[str, Tensor]:
        """Effect of each single unit on each prompt."""
        return dict(zip(self.singles, _effects(alone, clean, self.settings.effect), strict=True))

    def _rows(
        self,
        joints: Sequence[Joint],
        sets: Sequence[tuple[str, ...]],
        alone: Behaviour,
        together: Behaviour,
        clean: Behaviour,
    ) -> Iterator[dict[str, Any]]:
        rows = [joint.cells | estimates(together, len(sets) - len(joints) + n) for n, joint in enumerate(joints)]
        for loss in LOSS_SIGNS:
            effects = _effects(together, clean, loss)
            by_set: dict[tuple[str, ...], Tensor] = {}
            by_set |= {
                (name,): values for name, values in zip(self.singles, _effects(alone, clean, loss), strict=True)
            }
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
        yield from rows


def _effects(behaviour: Behaviour, clean: Behaviour, loss: Loss) -> Float[Tensor, "set prompt"]:
    """Effect of each ablation: the increase of a loss over the clean model's."""
    return behaviour.loss(loss).double() - clean.loss(loss).double()


def _sizes(n_sets: int, at_once: int) -> list[int]:
    """Number of sets in each piece."""
    return [min(at_once, n_sets - start) for start in range(0, n_sets, at_once)]
