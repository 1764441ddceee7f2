import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from oa_train import functional as F
from oa_train.errors import ConfigurationError

ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 10.0]]
MEANS = [4.0, 5.0, 19 / 3]

# Each takes activations and indices.
ABLATIONS: dict[str, Callable[..., Any]] = {
    "zero": F.zero_ablation,
    "mean": lambda values, neurons: F.mean_ablation(values, [4.5, 5.5, 6.5], neurons),
    "optimal": lambda values, neurons: F.optimal_ablation(values, [0.5, 0.25, -1.0], neurons),
    "resample": F.resample_ablation,
    "noise": lambda values, neurons: F.noise_ablation(values, MEANS, [1.0, 2.0, 3.0], neurons),
}


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_only_the_chosen_units_change_and_never_the_input(name: str, as_tensor: bool) -> None:
    values: Any = torch.tensor(ROWS) if as_tensor else ROWS
    before = copy.deepcopy(values)
    ablated = ABLATIONS[name](values, [0, 2])
    assert type(ablated) is type(values)
    assert torch.equal(torch.as_tensor(values), torch.as_tensor(before))
    result = torch.as_tensor(ablated)
    assert result[:, 1].tolist() == [2.0, 5.0, 8.0]
    assert not (result[:, [0, 2]] == torch.tensor(ROWS)[:, [0, 2]]).any()
    untouched = ABLATIONS[name](values, [])
    assert torch.equal(torch.as_tensor(untouched), torch.as_tensor(values))
    assert untouched is not values


def test_values() -> None:
    assert F.zero_ablation(ROWS, [1]) == [[1.0, 0.0, 3.0], [4.0, 0.0, 6.0], [7.0, 0.0, 10.0]]
    assert F.mean_ablation(ROWS, MEANS, [2]) == [[1.0, 2.0, 19 / 3], [4.0, 5.0, 19 / 3], [7.0, 8.0, 19 / 3]]
    assert F.optimal_ablation([[1, 2]], [0.1, 0.3], torch.tensor([0])) == [[0.1, 2.0]]
    assert F.mean_ablation([1.0, 2.0], [0.1, 0.2], [0]) == [0.1, 2.0]
    half = F.mean_ablation(torch.tensor(ROWS, dtype=torch.float16), MEANS, [0])
    assert half.dtype == torch.float16


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_resampled_from_another_one(seed: int) -> None:
    values = torch.arange(12.0).view(6, 2)
    ablated = F.resample_ablation(values, [0], seed=seed)
    assert sorted(ablated[:, 0].tolist()) == values[:, 0].tolist()
    assert not (ablated[:, 0] == values[:, 0]).any()
    assert torch.equal(F.resample_ablation(values, [0, 1], other=-values), -values)


def test_noise_has_the_given_moments() -> None:
    drawn = F.noise_ablation(torch.zeros(20_000, 2), [3.0, 0.0], [0.5, 0.0], [0, 1], seed=1)
    assert drawn[:, 0].mean().item() == pytest.approx(3, abs=0.02)
    assert drawn[:, 0].std().item() == pytest.approx(0.5, abs=0.02)
    assert not drawn[:, 1].any()
    assert torch.equal(drawn, F.noise_ablation(torch.zeros(20_000, 2), [3.0, 0.0], [0.5, 0.0], [0, 1], seed=1))


def test_optimal_constants_minimise_the_loss_and_are_never_worse_than_means() -> None:
    values = torch.tensor(ROWS, dtype=torch.float64)

    def loss(ablated: torch.Tensor) -> torch.Tensor:
        return (ablated.exp().mean() - math.exp(0.5)) ** 2

    constants = F.optimal_constants(values[:, :1] * 0.1, loss, [0], steps=500)
    assert constants.item() == pytest.approx(0.5, abs=1e-3)
    start = partial(F.optimal_constants, ROWS, lambda ablated: ablated.pow(2).sum(), [1])
    assert start(steps=0) == pytest.approx(MEANS)
    assert 0 < start(steps=3)[1] < MEANS[1]
    assert [start(steps=3)[0], start(steps=3)[2]] == pytest.approx([MEANS[0], MEANS[2]])


def test_the_effect_is_the_norm_of_the_difference() -> None:
    effect = F.compute_ablation_effect([[1.0, 2.0]], [[4.0, 6.0]])
    assert effect == 5.0
    assert isinstance(effect, float)
    assert F.ablation_effect(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])).item() == 5.0
    assert F.compute_ablation_effect(ROWS, ROWS) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.zero_ablation(ROWS, [3]), "holds 3; expected indices from 0 to 2, of 3 units"),
        (lambda: F.zero_ablation(ROWS, [-1]), "holds -1; expected indices from 0 to 2"),
        (lambda: F.zero_ablation(ROWS, [1, 1]), "names 1 twice"),
        (lambda: F.zero_ablation(ROWS, [1.5]), "holds 1.5; expected indices"),
        (lambda: F.zero_ablation(ROWS, [True]), "holds True; expected indices"),
        (lambda: F.zero_ablation([[1.0], [1.0, 2.0]], [0]), "activations is not an array of numbers"),
        (lambda: F.zero_ablation(3.0, [0]), "activations is a single number"),
        (lambda: F.mean_ablation(ROWS, [1.0], [0]), r"mean_activations has the shape \[1\]; expected \[3\]"),
        (lambda: F.noise_ablation(ROWS, MEANS, [1.0, -1.0, 0.0], [0]), "standard_deviations holds -1.0"),
        (lambda: F.resample_ablation([[1.0, 2.0]], [0]), "at least two rows"),
        (lambda: F.resample_ablation(ROWS, [0], other=[[1.0]]), r"other has the shape \[1, 1\]"),
        (lambda: F.compute_ablation_effect([[1.0]], [[1.0, 2.0]]), r"ablated has the shape \[1, 2\]"),
    ],
)
def test_bad_input_is_told(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()
