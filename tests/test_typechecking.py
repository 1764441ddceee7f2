"""The checks that run in all tests: types of every call, and dimensions that must agree."""

from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from oa_train.shapes import Float, Tensor
from tests.typechecking import MOST_CLOSURES, check

WRONG = (jaxtyping.TypeCheckError, BeartypeCallHintViolation)
checked = jaxtyping.jaxtyped(typechecker=check)


@checked
def scaled(values: Float[Tensor, "row unit"], weights: Float[Tensor, " row"]) -> Float[Tensor, "row unit"]:
    return values * weights.unsqueeze(1) if len(weights) > 1 else values[:1, :1].double()


@checked
def half(number: float) -> float:
    return number / 2 if number else "nothing"  # type: ignore[return-value]


def test_dimensions_of_one_name_agree():
    assert scaled(torch.ones(3, 2), torch.ones(3)).shape == (3, 2)
    for values, weights in (
        (torch.ones(3, 2), torch.ones(2)),
        (torch.ones(3), torch.ones(3)),
        (torch.ones(3, 2), torch.ones(1)),
    ):
        with pytest.raises(WRONG):
            scaled(values, weights)
    with pytest.raises(WRONG):
        scaled(torch.ones(3, 2).long(), torch.ones(3))


def test_arguments_and_results_without_tensors_are_checked_too():
    assert half(3) == half(3.0) == 1.5
    for wrong in ("3", None, 0):
        with pytest.raises(WRONG):
            half(wrong)


def test_fields_of_a_dataclass_are_checked():
    @checked
    @dataclass
    class Pair:
        first: Float[Tensor, " row"]
        second: Float[Tensor, " row"]

    assert len(Pair(torch.ones(2), torch.ones(2)).second) == 2
    with pytest.raises(WRONG):
        Pair(torch.ones(2), torch.ones(3))


def test_the_first_functions_made_inside_of_another_are_checked():
    def made():
        @checked
        def inside(number: int) -> int:
            return number

        return inside

    for _ in range(MOST_CLOSURES):
        with pytest.raises(WRONG):
            made()("one")
    assert made()("one") == "one"
