"""The tasks that configurations can name without their module. To add one, write its file and import it here."""

from oa_train.tasks.agreement import Agreement as Agreement
from oa_train.tasks.capitals import Capitals as Capitals
from oa_train.tasks.facts import Facts as Facts
from oa_train.tasks.greater_than import GreaterThan as GreaterThan
from oa_train.tasks.induction import Induction as Induction
from oa_train.tasks.ioi import IOI as IOI
from oa_train.tasks.records import Records as Records
from oa_train.tasks.synthetic_facts import SyntheticFacts as SyntheticFacts
from oa_train.tasks.text import Text as Text
