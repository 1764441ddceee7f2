"""Means with their uncertainty, and paired differences."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from oa_train.errors import NotFiniteError
from oa_train.shapes import Float, Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` prompts, its standard error, and its 95 % interval from Student's t distribution."""

    mean: float
    stderr: float
    ci95: tuple[float, float]
    n: int

    def __str__(self) -> str:
        """The mean and half the width of its interval: "0.0235 ± 0.003"."""
        return f"{self.mean:.3g} ± {self.ci95[1] - self.mean:.1g}"

    def as_json(self) -> dict[str, Any]:
        """The metric object of a results file."""
        return {"mean": self.mean, "stderr": self.stderr, "ci95": list(self.ci95), "n": self.n}


def estimate(values: Float[Tensor, " prompt"]) -> Estimate:
    """Mean of a figure from its values on at least two independent prompts."""
    array = values.double().numpy()
    mean, stderr = float(np.mean(array)), float(stats.sem(array))
    margin = stderr * float(stats.t.ppf(0.975, len(array) - 1))
    if not math.isfinite(margin):
        raise NotFiniteError(f"A mean over {len(array)} prompts and its error are not finite: {mean} ± {margin}.")
    return Estimate(mean, stderr, (mean - margin, mean + margin), len(array))


def paired_difference(first: Float[Tensor, " prompt"], second: Float[Tensor, " prompt"]) -> Estimate:
    """Mean of `first - second` over the same prompts.

    Prompts differ in difficulty far more than ablations do on one prompt, so the interval of the difference is much
    narrower than those of the two means suggest.
    """
    return estimate(first.double() - second.double())
