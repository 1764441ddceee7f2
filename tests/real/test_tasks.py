"""Tasks that a pretrained model of this size can do."""

from typing import Any

import pytest

from oa_train.ablations.clean_ability import clean_ability
from oa_train.models.frozen import CausalLM
from oa_train.models.spec import LMSpec
from oa_train.tasks import IOI, Agreement, Capitals, Facts, GreaterThan, Induction, Task

pytestmark = pytest.mark.real

RANDOM_TOKENS = {"vocabulary": "model", "length": 25, "repeated": 24, "answer_positions": "every"}


@pytest.mark.parametrize(
    ("task", "options", "accuracy", "difference"),
    [
        (IOI, {"sentences": "literature"}, 0.6, 3.0),
        (GreaterThan, {}, 0.9, 2.0),
        (Induction, RANDOM_TOKENS, 0.7, 4.0),
        (Capitals, {}, 0.5, 6.0),
        (Facts, {}, 0.6, 6.0),
        (Agreement, {}, 0.7, 3.0),
    ],
)
def test_the_clean_model_does_it(
    real: CausalLM, real_lm: LMSpec, task: type[Task], options: Any, accuracy: float, difference: float
) -> None:
    posed = task(lm=real_lm, **options)
    ability = clean_ability(real, posed.batches("test", 32, 16))
    assert ability.estimates["accuracy"].mean >= accuracy
    assert ability.estimates["logit_difference"].mean >= difference
    assert ability.warning is None
