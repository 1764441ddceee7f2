"""Rows, tables and figures of `trace`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from oa_train.ablations.tracing import TracedRun, Tracing
from oa_train.batches import WHOLE
from oa_train.figures.comparison import Interval
from oa_train.figures.style import Figure
from oa_train.figures.tracing import profile_figure, recovery_maps
from oa_train.metrics.estimates import Estimate, estimate
from oa_train.metrics.ranks import linear_correlation, rank_correlation
from oa_train.metrics.recovered import Identities, effective_layers, recovered, recovered_bootstrap
from oa_train.shapes import Float, Tensor
from oa_train.studies.study import Row, Table, interval, spoken

# Name of the run that restores nothing, for tables.
NOTHING = "nothing"


@dataclass(frozen=True, eq=False)
class Traced:
    """Results of every traced run on every prompt that the model answers correctly.

    Attributes:
        tracing: the traced runs; the tensors have one more, the last, which restores nothing.
        probabilities: probabilities of the answers by corruption: [draw, run, prompt].
        lost: drops in the answers' probability by corruption, averaged over draws: [run, prompt].
        identities: identities of the prompts; see `estimates.estimate`.
    """

    tracing: Tracing
    probabilities: Mapping[str, Float[Tensor, "draw run prompt"]]
    lost: Mapping[str, Float[Tensor, "run prompt"]]
    identities: Identities

    def rows(self) -> Iterator[Row]:
        """A row for each corruption and traced run, and one for each corruption with nothing restored."""
        for name, drop in self.lost.items():
            probabilities = self.probabilities[name].mean(dim=0)
            intervals = recovered_bootstrap(drop[:-1], drop[-1], self.identities)
            for number, run in enumerate(self.tracing.runs):
                low, high = intervals[number]
                yield {"corruption": name, "restored": run.kind, "at": run.span, "window": run.window} | {
                    "layer": run.layer,
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

    def _groups(self) -> Iterator[tuple[TracedRun, slice]]:
        """The first run of every kind, span and window, and the slice of its runs over the layers."""
        n_layers = len(self.tracing.layers)
        for first in range(0, len(self.tracing.runs), n_layers):
            yield self.tracing.runs[first], slice(first, first + n_layers)

    def localisation(self) -> Iterator[dict[str, Any]]:
        """Peak of each profile over the layers, and the number of layers over which it is spread."""
        for first, runs in self._groups():
            for name, drop in self.lost.items():
                peak = int(drop[runs].mean(dim=1).argmin())
                yield {"restored": first.kind, "at": first.span, "window": first.window, "corruption": name} | {
                    "peak": self.tracing.layers[peak],
                    "recovered": recovered(drop[runs][peak], drop[-1], self.identities),
                    "effective_layers": effective_layers(drop[runs], drop[-1], self.identities),
                }

    def agreement(self) -> list[dict[str, Any]]:
        """Rank and linear correlation of the recovery of all runs, for each pair of corruptions."""
        return [
            {
                "first": first,
                "second": second,
                "rank_correlation": rank_correlation(self.lost[first][:-1], self.lost[second][:-1]).as_json(),
                "correlation": linear_correlation(self.lost[first][:-1], self.lost[second][:-1]).as_json(),
            }
            for first, second in combinations(self.lost, 2)
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
            {"": f"{spoken(first)} and {spoken(second)}"}
            | {"rank correlation": str(rank_correlation(self.lost[first][:-1], self.lost[second][:-1]))}
            | {"correlation": str(linear_correlation(self.lost[first][:-1], self.lost[second][:-1]))}
            for first, second in combinations(self.lost, 2)
        ]
        if pairs:
            yield Table(f"Agreement on {len(self.tracing.runs)} restored places, with 95 % intervals", pairs)


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
    panels: dict[tuple[str, str], dict[str, list[Interval]]] = {}
    several = len({row.get("window") for row in rows if row["restored"] != NOTHING}) > 1
    for row in rows:
        if row["restored"] != NOTHING:
            where = place(row["at"]) + (f", {row['window']} layers" if several else "")
            panels.setdefault((row["restored"], where), {}).setdefault(row["corruption"], []).append(
                interval(row["recovered"])
            )
    labels = {row["corruption"]: f"{spoken(row['corruption'])} corruption" for row in rows}
    return profile_figure(panels, layers, labels, title)


def place_maps(rows: Sequence[Row], layers: Sequence[int], title: str) -> Figure:
    """Heat maps of recovery, places by layers, one for each corruption, kind and window."""
    tables: dict[tuple[str, str], dict[str, list[float]]] = {}
    several = len({row.get("window") for row in rows if row["restored"] != NOTHING}) > 1
    for row in rows:
        if row["restored"] != NOTHING:
            column = row["restored"] + (f", {row['window']} layers" if several else "")
            cells = tables.setdefault((spoken(row["corruption"]), column), {})
            cells.setdefault(place(row["at"]), []).append(row["recovered"].mean)
    names = list(next(iter(tables.values())))
    return recovery_maps({key: np.array([*lines.values()]) for key, lines in tables.items()}, names, layers, title)


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
