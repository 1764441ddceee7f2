"""Greedy search for a small sufficient set of units.

Units are restored until the set is sufficient, then removed while it stays sufficient. When no single unit can be
moved, pairs are tried; then a group of units that help only jointly (restoring), or swaps (removing).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Literal

import torch

from oa_train.shapes import Bool, Float, Tensor

# Maps masks [circuit, entry] to the recovery of each circuit.
Measure = Callable[[Bool[Tensor, "circuit entry"]], Float[Tensor, " circuit"]]
Move = Literal["start", "restore", "restore pair", "restore group", "remove", "remove pair", "swap"]

# Recoveries that differ by less count as equal: float32 cannot distinguish them.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Step:
    """One move of a search.

    Attributes:
        move: kind of move; a swap removes two units and restores one.
        restored: entries that were restored.
        removed: entries that were removed.
        mask: the set after the move.
        recovery: recovery of that set on the prompts of the search.
        tried: number of circuits evaluated in the step.
        units: number of units that could have been moved.
        screened: True if only some of these units were tried.
    """

    move: Move
    restored: tuple[int, ...]
    removed: tuple[int, ...]
    mask: Bool[Tensor, " entry"]
    recovery: float
    tried: int = 1
    units: int = 0
    screened: bool = False


@dataclass(frozen=True)
class Budget:
    """Limits of a search; see `SufficientSettings`."""

    candidates: int
    at_once: int = 1
    pairs: int = 0
    least_gain: float = 0.0


@dataclass(eq=False)
class GreedySearch:
    """A search for a small set whose recovery reaches a target.

    Attributes:
        measure: computes the recovery of circuits; 1 with all units kept.
        free: entries that may be moved; all others stay unchanged.
        target: recovery at which a set is sufficient.
        budget: limits of the search.
        scores: scores of all entries, higher for those to keep first. They order candidates that have not been tried
            yet; without them the first round in each direction tries all.
        on_step: called with every step.
    """

    measure: Measure
    free: Bool[Tensor, " entry"]
    target: float
    budget: Budget
    scores: Float[Tensor, " entry"] | None = None
    on_step: Callable[[Step], None] = lambda step: None
    steps: list[Step] = field(default_factory=list)
    # Number of circuits evaluated in the last round, which removed nothing.
    tried_in_vain: int = 0

    def run(self, start: Bool[Tensor, " entry"]) -> list[Step]:
        """Restore units, then remove units; the last step holds the final set."""
        # Last measured change in recovery when each unit is removed [0] or restored [1].
        self._changes = torch.full((2, len(self.free)), torch.nan, dtype=torch.float64)
        self._tried, self._screened = 0, False
        (recovery,) = self._measured([start])
        self._mask, self._recovery = start, recovery
        self._note("start", (), ())
        while not self._is_enough(self._recovery):
            self._single(True) or self._pair(True) or self._group()
        while self._single(False) or self._pair(False) or self._swap():
            pass
        self.tried_in_vain = self._tried
        return self.steps

    def _is_enough(self, recovery: float) -> bool:
        return recovery >= self.target - ROUNDING

    def _measured(self, masks: Sequence[Tensor]) -> list[float]:
        self._tried += len(masks)
        recoveries: list[float] = self.measure(torch.stack(list(masks))).tolist()
        return recoveries

    def _note(self, move: Move, restored: Sequence[int], removed: Sequence[int], units: int = 0) -> None:
        step = Step(
            move, tuple(restored), tuple(removed), self._mask, self._recovery, self._tried, units, self._screened
        )
        self._tried, self._screened = 0, False
        self.steps.append(step)
        self.on_step(step)

    def _moved(self, units: Sequence[int]) -> Bool[Tensor, " entry"]:
        """The set with these units flipped."""
        mask = self._mask.clone()
        mask[list(units)] = ~mask[list(units)]
        return mask

    def _is_good(self, restoring: bool, change: float) -> bool:
        return change > self.budget.least_gain if restoring else self._is_enough(self._recovery + change)

    def _queue(self, restoring: bool) -> list[int]:
        """Units that can be moved, in the order in which to try them.

        First those whose last trial looked good, then those never tried, then the others.
        """
        units: list[int] = (self.free & (self._mask != restoring)).nonzero().flatten().tolist()
        changes = self._changes[int(restoring)].tolist()
        prior = [0.0] * len(changes) if self.scores is None else (self.scores * (1 if restoring else -1)).tolist()

        def place(unit: int) -> tuple[int, float]:
            if math.isnan(changes[unit]):
                return 1, -prior[unit]
            return (0 if self._is_good(restoring, changes[unit]) else 2), -changes[unit]

        return sorted(units, key=place)

    def _chunks(self, queue: Sequence[int], restoring: bool) -> Iterator[tuple[int, ...]]:
        unranked = self.scores is None and bool(self._changes[int(restoring), list(queue)].isnan().any())
        size = max(1, len(queue)) if unranked else self.budget.candidates
        return (tuple(queue[first : first + size]) for first in range(0, len(queue), size))

    def _single(self, restoring: bool) -> bool:
        """Move the best unit, or several, from the first chunk of candidates that contains a good one."""
        queue = self._queue(restoring)
        for chunk in self._chunks(queue, restoring):
            recoveries = dict(zip(chunk, self._measured([self._moved([unit]) for unit in chunk]), strict=True))
            for unit, recovery in recoveries.items():
                self._changes[int(restoring), unit] = recovery - self._recovery
            good = [unit for unit in chunk if self._is_good(restoring, recoveries[unit] - self._recovery)]
            if good:
                good.sort(key=lambda unit: -recoveries[unit])
                units, recovery = self._as_many(good[: self.budget.at_once], recoveries[good[0]], restoring)
                self._screened = len(chunk) < len(queue)
                self._take("restore" if restoring else "remove", units, recovery, len(queue))
                return True
        return False

    def _as_many(self, units: Sequence[int], first: float, restoring: bool) -> tuple[Sequence[int], float]:
        """The units to move at once, the best first, and their recovery: all of them, half, a quarter, ..., or one.

        When restoring: the fewest that are sufficient, else those that recover most. When removing: as many as
        possible.
        """
        counts = [len(units) >> halvings for halvings in range(len(units).bit_length() - 1)]
        masks = [self._moved(units[:count]) for count in counts]
        recoveries = dict(zip([*counts, 1], [*(self._measured(masks) if masks else []), first], strict=True))
        enough = [count for count, recovery in recoveries.items() if self._is_enough(recovery)]
        if restoring:
            count = min(enough) if enough else max(recoveries, key=lambda count: recoveries[count])
        else:
            count = max(enough)
        return units[:count], recoveries[count]

    def _take(self, move: Move, units: Sequence[int], recovery: float, n_queued: int) -> None:
        restored = [unit for unit in units if not self._mask[unit]]
        removed = [unit for unit in units if self._mask[unit]]
        for unit in units:  # moving it back would undo the change
            into = int(not self._mask[unit])
            self._changes[1 - into, unit] = -self._changes[into, unit] if len(units) == 1 else torch.nan
        self._mask, self._recovery = self._moved(units), recovery
        self._note(move, restored, removed, n_queued)

    def _take_best(self, move: Move, groups: Sequence[tuple[int, ...]], n_queued: int, screened: bool) -> bool:
        """Move the best group of units, if it is good."""
        if not groups:
            return False
        recoveries = self._measured([self._moved(units) for units in groups])
        units, recovery = max(zip(groups, recoveries, strict=True), key=lambda group: group[1])
        if not self._is_good(move == "restore pair", recovery - self._recovery):
            return False
        self._screened = screened
        self._take(move, units, recovery, n_queued)
        return True

    def _pair(self, restoring: bool) -> bool:
        """Move the best pair of units, if it is good."""
        queue = self._queue(restoring)
        most = (1 + math.isqrt(1 + 8 * self.budget.pairs)) // 2
        pairs = list(combinations(queue[:most], 2)) if self.budget.pairs else []
        move: Move = "restore pair" if restoring else "remove pair"
        return self._take_best(move, pairs, len(queue), most < len(queue))

    def _swap(self) -> bool:
        """Remove two units and restore one, if the set stays sufficient."""
        kept, ablated = self._queue(False), self._queue(True)
        most = max((n for n in range(self.budget.pairs) if n * n * (n - 1) // 2 <= self.budget.pairs), default=0)
        swaps = [(*pair, unit) for pair, unit in product(combinations(kept[:most], 2), ablated[:most])]
        return self._take_best("swap", swaps, len(kept), most < max(len(kept), len(ablated)))

    def _group(self) -> bool:
        """Restore a minimal group of units that closes half of the gap to the target.

        The units are halved recursively (QuickXplain, Junker 2004): finding k among n units takes about k log(n / k)
        circuits.
        """
        queue = self._queue(True)
        wanted = min((self._recovery + self.target) / 2, self.target - ROUNDING)

        def needed(beside: list[int], is_new: bool, units: list[int]) -> list[int]:
            if is_new and self._measured([self._moved(beside)])[0] >= wanted:
                return []
            if len(units) == 1:
                return units
            first, second = units[: len(units) // 2], units[len(units) // 2 :]
            of_second = needed([*beside, *first], True, second)
            return [*needed([*beside, *of_second], bool(of_second), first), *of_second]

        group = needed([], False, queue)
        (recovery,) = self._measured([self._moved(group)])
        self._take("restore group", group, recovery, len(queue))
        return True
