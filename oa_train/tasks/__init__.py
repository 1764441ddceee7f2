"""Tasks: what the model is asked, and which continuations count as right.

A task draws prompts in words, makes sure that its tokenizer writes them as the task needs, and hands out batches
of token ids. It knows no weights and no training.
"""

from oa_train.tasks.greater_than import GreaterThan as GreaterThan
from oa_train.tasks.induction import Induction as Induction
from oa_train.tasks.ioi import IOI as IOI
from oa_train.tasks.task import Prompt as Prompt
from oa_train.tasks.task import Stream as Stream
from oa_train.tasks.task import Task as Task
from oa_train.zoo.known.case_induction_task import CaseInduction as CaseInduction
from oa_train.zoo.known.digit_sum_task import DigitSum as DigitSum
from oa_train.zoo.known.pair_induction_task import PairInduction as PairInduction
from oa_train.zoo.known.two_hops_task import TwoHops as TwoHops
