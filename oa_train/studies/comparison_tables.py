"""Rows of a comparison of ablations, converted for tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from oa_train.ablations.registry import ABLATION_KINDS, AblationName
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.metrics.estimates import Estimate, written
from oa_train.studies.study import MOST_LISTED, Row, spoken


def described_run(run: TrainedCircuit) -> dict[str, Any]:
    """Description of a run for `results.json`."""
    return {
        "name": run.name,
        "seed": run.seed,
        "trained_with": run.ablation,
        "nodes": list(run.circuit.nodes),
        **({} if run.circuit.level.has_one_stream else {"edges": list(run.circuit.names)}),
        **{f"n_{key}": value for key, value in run.circuit.counts().items()},
    }


def circuit_cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Table rows of one circuit, one for each ablation."""
    paired, cells = len(rows) > 1 and "kl_minus_optimal" in rows[0], []
    for row in rows:
        cell = {"ablation": label(row["ablation"]), "KL": row["kl"]}
        if paired:
            cell["KL minus\noptimal"] = None if row["ablation"] == "optimal" else row["kl_minus_optimal"]
        cells.append(cell | measure_cells(row))
    return cells


def measure_cells(row: Row) -> dict[str, str]:
    """Accuracy and logit difference, without intervals."""
    return {
        "accuracy": f"{row['accuracy'].mean:.3f}",
        "logit\ndifference": f"{row['logit_difference'].mean + 0.0:.2f}",
    }


def most_listed(title: str, n_parts: int) -> str:
    """Title of a table of parts that lists at most the first `MOST_LISTED`."""
    return title + (f": the {MOST_LISTED} of {n_parts} that matter most" if n_parts > MOST_LISTED else "")


def alone_cells(rows: Sequence[Row], n_kinds: int) -> list[dict[str, Any]]:
    """Table rows, one for each component, with a column for each ablation; in descending order of the first one."""
    by_component = [rows[first : first + n_kinds] for first in range(0, len(rows), n_kinds)]
    by_component.sort(key=lambda of_kinds: -of_kinds[0]["kl"].mean)
    return [
        {"ablated": of_kinds[0]["component"]}
        | {
            label(row["ablation"]).replace("counterfactual", "counter-\nfactual").replace(" ", "\n"): row["kl"].mean
            for row in of_kinds
        }
        for of_kinds in by_component
    ]


def seeds_line(group: Mapping[str, Any]) -> str:
    """Sentence about mean and spread over runs that differ only in their seed."""
    kl, size = group["kl"], group["size"]
    return (
        f"seeds {', '.join(map(str, group['seeds']))} of {group['runs'][0]} and its repeats: KL under "
        f"{spoken(group['ablation'])} ablation {written(kl['mean'])} ± {written(kl['standard_deviation'], 2)} "
        f"(standard deviation), size {written(size['mean'])} ± {written(size['standard_deviation'], 2)}, "
        f"Jaccard {group['jaccard']:.2f}"
    )


def label(kind: AblationName) -> str:
    """Name of an ablation in tables and legends."""
    return spoken(kind) + ("" if ABLATION_KINDS[kind].total else " (not total)")


def kl_by_ablation(rows: Sequence[Row]) -> dict[str, list[Estimate]]:
    """KL divergences with their intervals, by ablation."""
    by_kind: dict[str, list[Estimate]] = {}
    for row in rows:
        by_kind.setdefault(row["ablation"], []).append(row["kl"])
    return by_kind
