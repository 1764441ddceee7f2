"""Rows, tables and figures of `trace`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from oa_train.ablations.tracing import TracedRun, Tracing
from oa_train.batches import WHOLE
from oa_train.figures.style import Figure
from oa_train.figures.tracing import profile_figure, recovery_maps
from oa_train.metrics.estimates import Estimate, Identities, estimate
from oa_train.metrics.ranks import Bootstrapped, linear_correlation, rank_correlation
from oa_train.metrics.recovered import effective_layers, recovered, recovered_bootstrap
from oa_train.shapes import Float, Tensor
from oa_train.studies.study import Row, Table, spoken

# Name of the run that restores nothing, for tables.
NOTHING = "nothing"


@dataclass(frozen=True, eq=False)
class Traced:
    """Results of every traced run on every prompt that the model answers correctly.

    Attributes:
        tracing: the traced runs; the tensors have one more, the last, which restores nothing.
        probabilities: probabilities of the answers by corruption: [draw, run, prompt].
        drops: drops in the answers' probability by corruption, averaged over draws: [run, prompt].
        identities: identities of the prompts; see `estimates.estimate`.
    """

    tracing: Tracing
    probabilities: Mapping[str, Float[Tensor, "draw run prompt"]]
    drops: Mapping[str, Float[Tensor, "run prompt"]]
    identities: Identities

    def rows(self) -> Iterator[Row]:
        """A row for each corruption and traced run, and one for each corruption with nothing restored."""
        for name, drop in self.drops.items():
            probabilities = self.probabilities[name].mean(dim=0)
            intervals = recovered_bootstrap(drop[:-1], drop[-1], self.identities)
            for number, run in enumerate(self.tracing.runs):
                low, high = intervals[number]
                yield {"corruption": name, **where(run), "layer": run.layer} | {
                    "recovered": recovered(drop[number], drop[-1], self.identities),
                    "bootstrap_low": low,
                    "bootstrap_high": high,
                    "probability": estimate(probabilities[number], self.identities),
                }
            yield {
                "corruption": name,
                "restored": NOTHING,
                "probability": estimate(probabilities[-1], self.identities),
            }

    def localisation(self) -> Iterator[dict[str, Any]]:
        """Peak of each profile over the layers, and the number of layers over which it is spread."""
        for first, runs in by_place(self.tracing):
            for name, drop in self.drops.items():
                peak = int(drop[runs].mean(dim=1).argmin())
                yield {**where(first), "corruption": name} | {
                    "peak": self.tracing.layers[peak],
                    "recovered": recovered(drop[runs][peak], drop[-1], self.identities),
                    "effective_layers": effective_layers(drop[runs], drop[-1], self.identities),
                }

    def agreement(self) -> list[dict[str, Any]]:
        """Rank and linear correlation of the recovery of all runs, for each pair of corruptions."""
        return [
            {"first": first, "second": second, "rank_correlation": ranks.as_json(), "correlation": values.as_json()}
            for first, second, ranks, values in self._correlations
        ]

    @cached_property
    def _correlations(self) -> list[tuple[str, str, Bootstrapped, Bootstrapped]]:
        return [
            (first, second, rank_correlation(a[:-1], b[:-1]), linear_correlation(a[:-1], b[:-1]))
            for (first, a), (second, b) in combinations(self.drops.items(), 2)
        ]

    def tables(self, clean: Estimate) -> Iterator[Table | str]:
        """Tables for the terminal."""
        nothing = [
            {"corruption": spoken(name), "probability of the answer": estimate(p.mean(dim=0)[-1], self.identities)}
            for name, p in self.probabilities.items()
        ]
        yield Table(
            "The subject corrupted and nothing restored, mean and 95 % interval",
            [{"corruption": "none", "probability of the answer": clean}, *nothing],
        )
        yield Table(
            "Share of the lost probability that is recovered, by layer",
            [
                {"restored": line["restored"], "at": place(line["at"]), "layers": line["window"]}
                | {"corruption": spoken(line["corruption"]), "peak layer": line["peak"]}
                | {"recovered at the peak": line["recovered"], "effective layers": line["effective_layers"]}
                for line in self.localisation()
            ],
        )
        pairs = [
            {"": f"{spoken(first)} and {spoken(second)}", "rank correlation": str(ranks), "correlation": str(values)}
            for first, second, ranks, values in self._correlations
        ]
        if pairs:
            yield Table(f"Agreement on {len(self.tracing.runs)} restored places, with 95 % intervals", pairs)


def by_place(tracing: Tracing) -> Iterator[tuple[TracedRun, slice]]:
    """The first run of every kind, span and window, and the slice of its runs, one for each layer."""
    n_layers = len(tracing.layers)
    for first in range(0, len(tracing.runs), n_layers):
        yield tracing.runs[first], slice(first, first + n_layers)


def where(run: TracedRun) -> dict[str, Any]:
    """Kind of site, span and window that a run restores, as columns."""
    return {"restored": run.kind, "at": run.span, "window": run.window}


def place(span: str) -> str:
    """Name of a span in tables and figures."""
    if span == WHOLE:
        return "every token"
    if span.startswith("-"):
        return "last token" if span == "-1" else f"token {span}"
    for suffix, words in {
        "_last": "last token of {}",
        "_first": "first token of {}",
        "_next": "token after {}",
    }.items():
        if span.endswith(suffix):
            return words.format(span.removesuffix(suffix))
    return span


def profiles(rows: Sequence[Row], layers: Sequence[int], title: str) -> Figure:
    """Figure of recovery by layer, with a panel for each kind, place and window."""
    panels: dict[tuple[str, str], dict[str, list[Estimate]]] = {}
    for row, window in _restoring(rows):
        profiles = panels.setdefault((row["restored"], place(row["at"]) + window), {})
        profiles.setdefault(row["corruption"], []).append(row["recovered"])
    labels = {row["corruption"]: f"{spoken(row['corruption'])} corruption" for row in rows}
    return profile_figure(panels, layers, labels, title)


def place_maps(rows: Sequence[Row], layers: Sequence[int], title: str) -> Figure:
    """Heat maps of recovery, places by layers, one for each corruption, kind and window."""
    tables: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row, window in _restoring(rows):
        lines = tables.setdefault((spoken(row["corruption"]), row["restored"] + window), {})
        lines.setdefault(place(row["at"]), []).append(row["recovered"].mean)
    names = list(next(iter(tables.values())))
    return recovery_maps({key: np.array([*lines.values()]) for key, lines in tables.items()}, names, layers, title)


def _restoring(rows: Sequence[Row]) -> Iterator[tuple[Row, str]]:
    """Rows of runs that restore something, each with its window in words if there are several."""
    restoring = [row for row in rows if row["restored"] != NOTHING]
    several = len({row["window"] for row in restoring}) > 1
    for row in restoring:
        yield row, f", {row['window']} layers" if several else ""


def token_maps(
    tables: Mapping[tuple[str, str], np.ndarray],
    tokens: Sequence[str],
    answer: str,
    layers: Sequence[int],
    subject: str,
) -> Figure:
    """Heat maps of recovery at every token of one prompt; corrupted tokens have an asterisk."""
    title = f"{subject}: one prompt, answered by {answer!r}; corrupted tokens have a *"
    return recovery_maps(tables, tokens, layers, title, 1.0)
