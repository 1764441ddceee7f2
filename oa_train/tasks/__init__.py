"""Tasks: prompts, and the right and wrong continuations.

A task is a source of prompts, and makes batches of token ids from them. It knows nothing of weights and training.
"""

from oa_train.tasks.grammar import GrammarTask as GrammarTask
from oa_train.tasks.registry import *  # noqa: F403 (every task is a name of the package)
from oa_train.tasks.task import Prompt as Prompt, Question as Question, Stream as Stream, Task as Task
