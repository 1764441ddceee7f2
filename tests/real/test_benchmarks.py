"""The benchmarks on the pretrained model run."""

import pytest

from benchmarks.real_steps import measured

pytestmark = pytest.mark.real


@pytest.mark.parametrize("part", ["nodes", "edges"])
def test_a_step_is_compared_with_the_plain_model(real_lm, part):
    (row,) = measured(part, real_lm, 2)
    assert row["ratio"]["n"] == 2
    assert 0.5 < row["ratio"]["median"] < 5


def test_the_trainer_is_compared_with_a_bare_loop(real_lm):
    (row,) = measured("trainer", real_lm, 1)
    assert row["seconds"]
