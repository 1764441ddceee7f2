"""Models whose weights are written by hand, in Hugging Face's own classes, so that their circuits are known.

Each solves a task with a few edges, and has other parts that are active without contributing. So methods that find
circuits can be compared with the truth.
"""

from oa_train.zoo.known.backup_induction import BackupInduction as BackupInduction
from oa_train.zoo.known.case_induction import CaseInduction as CaseInduction
from oa_train.zoo.known.digit_sum import DigitSum as DigitSum
from oa_train.zoo.known.model import KnownModel as KnownModel
from oa_train.zoo.known.pair_induction import PairInduction as PairInduction
from oa_train.zoo.known.registry import (
    KNOWN_MODELS as KNOWN_MODELS,
    KNOWN_TASKS as KNOWN_TASKS,
    write_known as write_known,
)
from oa_train.zoo.known.two_hops import TwoHops as TwoHops
