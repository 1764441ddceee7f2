"""Models whose weights were written by hand, in Hugging Face's own classes, so that their circuits are known.

Each solves a task by a few edges and has parts besides that do something and have no share in it. What finds circuits
can so be held to the truth.
"""

from collections.abc import Callable

from oa_train.zoo.known.case_induction import build_case_induction
from oa_train.zoo.known.digit_sum import build_digit_sum
from oa_train.zoo.known.model import KnownModel
from oa_train.zoo.known.pair_induction import build_pair_induction
from oa_train.zoo.known.two_hops import build_two_hops

# From a seed to the model; the name is also that of its task.
KNOWN_MODELS: dict[str, Callable[[int], KnownModel]] = {
    "case_induction": build_case_induction,
    "two_hops": build_two_hops,
    "digit_sum": build_digit_sum,
    "pair_induction": build_pair_induction,
}
