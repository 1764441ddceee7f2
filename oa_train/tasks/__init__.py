"""Tasks: what the model is asked, and which continuations count as right.

A task draws prompts in words, makes sure that its tokenizer writes them as the task needs, and hands out batches
of token ids. It knows no weights and no training.
"""

from oa_train.tasks.base import Prompt as Prompt
from oa_train.tasks.base import Stream as Stream
from oa_train.tasks.base import Task as Task
from oa_train.tasks.case_induction import CaseInduction as CaseInduction
from oa_train.tasks.digit_sum import DigitSum as DigitSum
from oa_train.tasks.greater_than import GreaterThan as GreaterThan
from oa_train.tasks.induction import Induction as Induction
from oa_train.tasks.ioi import IOI as IOI
from oa_train.tasks.pair_induction import PairInduction as PairInduction
from oa_train.tasks.two_hops import TwoHops as TwoHops
