"""How much several circuits agree: their overlap, and how figures vary over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from oa_train.circuits.circuit import jaccard
from oa_train.studies.runs import TrainedCircuit


def jaccard_matrix(runs: Sequence[TrainedCircuit]) -> list[list[float]]:
    """Overlap of every two circuits: shared components over components in either."""
    return [[jaccard(one.circuit, other.circuit) for other in runs] for one in runs]


def over_seeds(runs: Sequence[TrainedCircuit], kl: Mapping[str, float]) -> list[dict[str, Any]]:
    """Mean and spread over the runs of each experiment, where there are several.

    Args:
        runs: the runs; those of one experiment and one ablation differ in their seeds.
        kl: KL divergence of each run's circuit in nats, by its name.

    Returns:
        For each experiment: its name, the ablation it was trained under, the seeds, mean, standard deviation and 95 %
        interval of size and KL divergence over runs, and the mean overlap of two of its circuits.
    """
    groups: dict[tuple[str, str], list[TrainedCircuit]] = {}
    for run in runs:
        groups.setdefault((run.experiment, run.ablation), []).append(run)
    return [
        {
            "experiment": experiment,
            "trained_with": ablation,
            "seeds": [run.seed for run in group],
            "size": _spread([len(run.circuit) for run in group]),
            "kl": _spread([kl[run.name] for run in group]),
            "jaccard": _mean_overlap(group),
        }
        for (experiment, ablation), group in groups.items()
        if len(group) > 1
    ]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    array = np.asarray(values, dtype=float)
    margin = float(stats.sem(array) * stats.t.ppf(0.975, len(array) - 1))
    mean = float(array.mean())
    return {
        "mean": mean,
        "standard_deviation": float(array.std(ddof=1)),
        "ci95": [mean - margin, mean + margin],
        "n": len(array),
    }


def _mean_overlap(group: Sequence[TrainedCircuit]) -> float:
    matrix = np.array(jaccard_matrix(group))
    return float(matrix[np.triu_indices(len(group), k=1)].mean())
