"""The names of `oa_train`, imported when they are first used."""

__version__: str

from .ablations.constants import Constants as Constants
from .ablations.context import ablated as ablated
from .ablations.evaluation import circuit_behaviour as circuit_behaviour
from .ablations.fitting import RefitSettings as RefitSettings, fit_constants as fit_constants
from .ablations.registry import ABLATION_KINDS as ABLATION_KINDS, AblationSource as AblationSource
from .ablations.tracing_constants import TracingConstants as TracingConstants
from .ablations.trained_circuit import TrainedCircuit as TrainedCircuit
from .ablations.worst_mask import AscentSettings as AscentSettings
from .batches import Batch as Batch
from .circuits.circuit import Circuit as Circuit, jaccard as jaccard
from .circuits.published import published_ioi_circuit as published_ioi_circuit
from .engine.forward import scored_logits as scored_logits
from .engine.levels import masked_logits as masked_logits
from .engine.reading import read_values as read_values
from .engine.values import Values as Values
from .errors import OaTrainError as OaTrainError
from .lenses.trained_lenses import TrainedLenses as TrainedLenses, load_tuned_lens as load_tuned_lens
from .masks.hard_concrete import HardConcrete as HardConcrete
from .masks.uniform import UniformGradientSampling as UniformGradientSampling
from .models.dictionaries import Dictionary as Dictionary, load_dictionary as load_dictionary
from .models.graph import Graph as Graph
from .models.loading import load_model as load_model
from .models.selection import Nodes as Nodes
from .models.sites import Site as Site
from .models.spec import LMSpec as LMSpec
from .studies.compare import Compare as Compare, CompareSettings as CompareSettings
from .studies.compare_lenses import (
    CompareLenses as CompareLenses,
    CompareLensesSettings as CompareLensesSettings,
)
from .studies.curve import Curve as Curve, CurveSettings as CurveSettings
from .studies.faithfulness import (
    Faithfulness as Faithfulness,
    FaithfulnessSettings as FaithfulnessSettings,
)
from .studies.finish_circuits import FinishSettings as FinishSettings, finish as finish
from .studies.finish_constants import finish_constants as finish_constants
from .studies.interact import Interact as Interact, InteractSettings as InteractSettings
from .studies.lens import LensSettings as LensSettings, ReadPrompt as ReadPrompt
from .studies.minimal import Minimal as Minimal, MinimalSettings as MinimalSettings
from .studies.robustness import Robustness as Robustness, RobustnessSettings as RobustnessSettings
from .studies.run_folder import RunFolder as RunFolder
from .studies.scan import Scan as Scan, ScanSettings as ScanSettings
from .studies.study import Findings as Findings, Study as Study, Table as Table, estimates as estimates
from .studies.sufficient import Sufficient as Sufficient, SufficientSettings as SufficientSettings
from .studies.trace import Trace as Trace
from .studies.trace_settings import TraceSettings as TraceSettings
from .tasks.agreement import Agreement as Agreement
from .tasks.capitals import Capitals as Capitals
from .tasks.facts import Facts as Facts
from .tasks.grammar import GrammarTask as GrammarTask
from .tasks.greater_than import GreaterThan as GreaterThan
from .tasks.induction import Induction as Induction
from .tasks.ioi import IOI as IOI
from .tasks.records import Records as Records
from .tasks.synthetic_facts import SyntheticFacts as SyntheticFacts
from .tasks.task import Prompt as Prompt, Question as Question, Task as Task
from .tasks.text import Text as Text
from .training.callbacks import BestCheckpoint as BestCheckpoint, LastCheckpoint as LastCheckpoint
from .training.circuit_module import CircuitModule as CircuitModule
from .training.constants_module import ConstantsModule as ConstantsModule
from .training.data import TaskData as TaskData
from .training.interruption import StopAtSignal as StopAtSignal
from .training.lens_module import LensModule as LensModule
from .training.strategies import ShardedStrategy as ShardedStrategy
from .training.tracing_module import TracingModule as TracingModule
