"""Agreement of several circuits: their overlap, and the spread of metrics over seeds."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.circuits.circuit import jaccard
from oa_train.metrics.estimates import estimate


def jaccard_matrix(runs: Sequence[TrainedCircuit]) -> list[list[float]]:
    """Jaccard overlap of every pair of circuits: entries in both divided by entries in either."""
    return [[jaccard(first.circuit, second.circuit) for second in runs] for first in runs]


def over_seeds(runs: Sequence[TrainedCircuit], kl: Mapping[str, float], ablation: str) -> list[dict[str, Any]]:
    """Mean and spread over each group of runs that differ only in their seed.

    `kl` has the KL divergence of each run's circuit under the ablation, in nats, by name of the run.

    Returns:
        For each group of at least two: names and seeds of its runs, the ablations, mean, standard deviation and 95 %
        interval of size and KL divergence over runs, and the mean pairwise overlap of its circuits.
    """
    groups: dict[str, dict[int, TrainedCircuit]] = {}
    for run in runs:
        if run.seed is not None and "training" in run.circuit.provenance:
            groups.setdefault(_all_but_the_seed(run), {}).setdefault(run.seed, run)
    return [_summary(list(group.values()), kl, ablation) for group in groups.values() if len(group) > 1]


def _all_but_the_seed(run: TrainedCircuit) -> str:
    # A model is identified by its fingerprint: its path differs from one machine to another.
    varying = ("seed", "edges_before_removal", *(["model"] if "fingerprint" in run.circuit.provenance else []))
    provenance = {key: value for key, value in run.circuit.provenance.items() if key not in varying}
    task = {key: value for key, value in provenance["task"].items() if key != "seed"}
    return json.dumps(provenance | {"task": task}, sort_keys=True, default=str)


def _summary(group: Sequence[TrainedCircuit], kl: Mapping[str, float], ablation: str) -> dict[str, Any]:
    return {
        "runs": [run.name for run in group],
        "seeds": [run.seed for run in group],
        "trained_with": group[0].ablation,
        "ablation": ablation,
        "size": _spread([len(run.circuit) for run in group]),
        "kl": _spread([kl[run.name] for run in group]),
        "jaccard": float(
            np.mean([jaccard(first.circuit, second.circuit) for first, second in combinations(group, 2)])
        ),
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    over_runs = estimate(torch.tensor(values, dtype=torch.float64))
    return {
        "mean": over_runs.mean,
        "standard_deviation": float(np.std(values, ddof=1)),
        "ci95": list(over_runs.ci95),
        "n": over_runs.n,
    }
