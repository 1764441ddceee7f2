"""Control: random circuits of equal size, with constants trained in the same way as for the run's circuit."""

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_passes
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.circuits.random import random_circuits
from oa_train.progress import Stage
from oa_train.studies.ablation_study import AblationStudy
from oa_train.tasks.task import Task


def random_stages(n_circuits: int, fit: RefitSettings, n_prompts: int, task: Task) -> list[Stage]:
    """Stages of `beside_random_circuits`."""
    return [
        Stage("fitting constants of random circuits", fit_passes(1 + n_circuits, fit, task.n_validation, 1)),
        Stage("evaluating random circuits", (1 + n_circuits) * n_prompts),
    ]


def beside_random_circuits(
    study: AblationStudy[Any], run: TrainedCircuit, n_circuits: int, fit: RefitSettings, n_prompts: int
) -> dict[str, Any]:
    """KL divergence of a run's circuit and of random circuits of its size, all with constants trained from the means.

    Returns:
        `size`, `kl` of each random circuit and `run_kl` in nats, `percentile`, the percentage of random circuits that
        do at least as well as the run's, and the numbers of training `steps` and of prompts.
    """
    level, size = run.circuit.level, len(run.circuit)
    drawn = random_circuits(level, size, n_circuits, study.task.seed, run.selected)
    masks = torch.stack([run.circuit.mask, *(circuit.mask for circuit in drawn)])
    starts = [study.source.mean] * len(masks)
    sets = study.fitted_constants(masks, fit, "random circuits", starts=starts)
    with study.track(len(masks) * n_prompts, "evaluating random circuits") as advance:
        prompts = study.task.batches("test", n_prompts)
        behaviour = circuit_behaviour(study.model, prompts, level, masks, sets, fit.rows_per_run, advance=advance)
    run_kl, *kl = behaviour.kl.mean(dim=1).tolist()
    as_good = sum(value <= run_kl for value in kl)
    return {
        "size": size,
        "kl": kl,
        "run_kl": run_kl,
        "percentile": 100 * as_good / len(kl),
        "steps": fit.steps,
        "n_prompts": n_prompts,
    }


def random_line(control: Mapping[str, Any], parts: str) -> str:
    """Sentence about the comparison with random circuits."""
    kl, run_kl = control["kl"], control["run_kl"]
    as_good = sum(value <= run_kl for value in kl)
    verdict = "none of them is as good" if not as_good else f"{as_good} of them are as good or better"
    return (
        f"{len(kl)} random circuits of {control['size']:,} {parts}, on {control['n_prompts']} prompts, constants "
        f"trained for {control['steps']} steps: median KL {statistics.median(kl):.3g}, lowest "
        f"{min(kl):.3g}; the run's circuit after the same training {run_kl:.3g}: {verdict}"
    )
