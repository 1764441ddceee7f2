"""Learned ablations and sparse circuit masks for Hugging Face transformers.

Names are imported when they are first used, so that `import oa_train` is quick and does not import torch or Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from oa_train.ablations.ascent import AscentSettings as AscentSettings
    from oa_train.ablations.constants import Constants as Constants
    from oa_train.ablations.context import ablated as ablated
    from oa_train.ablations.evaluation import circuit_behaviour as circuit_behaviour
    from oa_train.ablations.fitting import RefitSettings as RefitSettings
    from oa_train.ablations.fitting import fit_constants as fit_constants
    from oa_train.ablations.registry import KINDS as KINDS
    from oa_train.ablations.registry import AblationSource as AblationSource
    from oa_train.ablations.tracing_constants import TracingConstants as TracingConstants
    from oa_train.ablations.trained import TrainedCircuit as TrainedCircuit
    from oa_train.batches import Batch as Batch
    from oa_train.circuits.circuit import Circuit as Circuit
    from oa_train.circuits.circuit import jaccard as jaccard
    from oa_train.circuits.published import published_ioi_circuit as published_ioi_circuit
    from oa_train.engine.forward import scored_logits as scored_logits
    from oa_train.engine.levels import masked_logits as masked_logits
    from oa_train.engine.reading import read_values as read_values
    from oa_train.engine.values import Values as Values
    from oa_train.errors import OaTrainError as OaTrainError
    from oa_train.lenses.trained_lenses import TrainedLenses as TrainedLenses
    from oa_train.lenses.trained_lenses import load_tuned_lens as load_tuned_lens
    from oa_train.masks.hard_concrete import HardConcrete as HardConcrete
    from oa_train.masks.uniform import UniformGradientSampling as UniformGradientSampling
    from oa_train.models.dictionaries import Dictionary as Dictionary
    from oa_train.models.dictionaries import load_dictionary as load_dictionary
    from oa_train.models.graph import Graph as Graph
    from oa_train.models.loading import load_model as load_model
    from oa_train.models.selection import Nodes as Nodes
    from oa_train.models.sites import Site as Site
    from oa_train.models.spec import LMSpec as LMSpec
    from oa_train.studies.compare import Compare as Compare
    from oa_train.studies.compare import CompareSettings as CompareSettings
    from oa_train.studies.compare_lenses import CompareLenses as CompareLenses
    from oa_train.studies.compare_lenses import CompareLensesSettings as CompareLensesSettings
    from oa_train.studies.curve import Curve as Curve
    from oa_train.studies.curve import CurveSettings as CurveSettings
    from oa_train.studies.faithfulness import Faithfulness as Faithfulness
    from oa_train.studies.faithfulness import FaithfulnessSettings as FaithfulnessSettings
    from oa_train.studies.finish import FinishSettings as FinishSettings
    from oa_train.studies.finish import finish as finish
    from oa_train.studies.finish_constants import finish_constants as finish_constants
    from oa_train.studies.interact import Interact as Interact
    from oa_train.studies.interact import InteractSettings as InteractSettings
    from oa_train.studies.lens import LensSettings as LensSettings
    from oa_train.studies.lens import ReadPrompt as ReadPrompt
    from oa_train.studies.minimal import Minimal as Minimal
    from oa_train.studies.minimal import MinimalSettings as MinimalSettings
    from oa_train.studies.robustness import Robustness as Robustness
    from oa_train.studies.robustness import RobustnessSettings as RobustnessSettings
    from oa_train.studies.run_folder import RunFolder as RunFolder
    from oa_train.studies.scan import Scan as Scan
    from oa_train.studies.scan import ScanSettings as ScanSettings
    from oa_train.studies.study import Findings as Findings
    from oa_train.studies.study import Study as Study
    from oa_train.studies.study import Table as Table
    from oa_train.studies.study import estimates as estimates
    from oa_train.studies.sufficient import Sufficient as Sufficient
    from oa_train.studies.sufficient import SufficientSettings as SufficientSettings
    from oa_train.studies.trace import Trace as Trace
    from oa_train.studies.trace_settings import TraceSettings as TraceSettings
    from oa_train.tasks.agreement import Agreement as Agreement
    from oa_train.tasks.capitals import Capitals as Capitals
    from oa_train.tasks.facts import Facts as Facts
    from oa_train.tasks.grammar import GrammarTask as GrammarTask
    from oa_train.tasks.greater_than import GreaterThan as GreaterThan
    from oa_train.tasks.induction import Induction as Induction
    from oa_train.tasks.ioi import IOI as IOI
    from oa_train.tasks.records import Records as Records
    from oa_train.tasks.synthetic_facts import SyntheticFacts as SyntheticFacts
    from oa_train.tasks.task import Prompt as Prompt
    from oa_train.tasks.task import Question as Question
    from oa_train.tasks.task import Task as Task
    from oa_train.tasks.text import Text as Text
    from oa_train.training.callbacks import BestCheckpoint as BestCheckpoint
    from oa_train.training.callbacks import LastCheckpoint as LastCheckpoint
    from oa_train.training.circuit_module import CircuitModule as CircuitModule
    from oa_train.training.constants_module import ConstantsModule as ConstantsModule
    from oa_train.training.data import TaskData as TaskData
    from oa_train.training.interruption import StopAtSignal as StopAtSignal
    from oa_train.training.lens_module import LensModule as LensModule
    from oa_train.training.strategies import ShardedStrategy as ShardedStrategy
    from oa_train.training.tracing_module import TracingModule as TracingModule

_HOMES = {
    "Agreement": "tasks.agreement",
    "AblationSource": "ablations.registry",
    "AscentSettings": "ablations.ascent",
    "Batch": "batches",
    "BestCheckpoint": "training.callbacks",
    "Capitals": "tasks.capitals",
    "Circuit": "circuits.circuit",
    "CircuitModule": "training.circuit_module",
    "Compare": "studies.compare",
    "CompareSettings": "studies.compare",
    "Constants": "ablations.constants",
    "ConstantsModule": "training.constants_module",
    "Curve": "studies.curve",
    "CurveSettings": "studies.curve",
    "Dictionary": "models.dictionaries",
    "Facts": "tasks.facts",
    "Findings": "studies.study",
    "FinishSettings": "studies.finish",
    "GrammarTask": "tasks.grammar",
    "Graph": "models.graph",
    "GreaterThan": "tasks.greater_than",
    "HardConcrete": "masks.hard_concrete",
    "IOI": "tasks.ioi",
    "Induction": "tasks.induction",
    "Interact": "studies.interact",
    "InteractSettings": "studies.interact",
    "KINDS": "ablations.registry",
    "LMSpec": "models.spec",
    "LastCheckpoint": "training.callbacks",
    "Minimal": "studies.minimal",
    "MinimalSettings": "studies.minimal",
    "Nodes": "models.selection",
    "OaTrainError": "errors",
    "Prompt": "tasks.task",
    "Question": "tasks.task",
    "RefitSettings": "ablations.fitting",
    "Robustness": "studies.robustness",
    "RobustnessSettings": "studies.robustness",
    "RunFolder": "studies.run_folder",
    "Scan": "studies.scan",
    "ScanSettings": "studies.scan",
    "ShardedStrategy": "training.strategies",
    "Site": "models.sites",
    "StopAtSignal": "training.interruption",
    "Study": "studies.study",
    "Sufficient": "studies.sufficient",
    "SufficientSettings": "studies.sufficient",
    "SyntheticFacts": "tasks.synthetic_facts",
    "Table": "studies.study",
    "Task": "tasks.task",
    "TaskData": "training.data",
    "Text": "tasks.text",
    "TrainedCircuit": "ablations.trained",
    "UniformGradientSampling": "masks.uniform",
    "Values": "engine.values",
    "ablated": "ablations.context",
    "circuit_behaviour": "ablations.evaluation",
    "finish": "studies.finish",
    "finish_constants": "studies.finish_constants",
    "estimates": "studies.study",
    "fit_constants": "ablations.fitting",
    "jaccard": "circuits.circuit",
    "load_dictionary": "models.dictionaries",
    "load_model": "models.loading",
    "masked_logits": "engine.levels",
    "published_ioi_circuit": "circuits.published",
    "read_values": "engine.reading",
    "scored_logits": "engine.forward",
    "Trace": "studies.trace",
    "TraceSettings": "studies.trace_settings",
    "CompareLenses": "studies.compare_lenses",
    "CompareLensesSettings": "studies.compare_lenses",
    "ReadPrompt": "studies.lens",
    "LensSettings": "studies.lens",
    "Faithfulness": "studies.faithfulness",
    "FaithfulnessSettings": "studies.faithfulness",
    "LensModule": "training.lens_module",
    "TracingModule": "training.tracing_module",
    "TrainedLenses": "lenses.trained_lenses",
    "TracingConstants": "ablations.tracing_constants",
    "Records": "tasks.records",
    "load_tuned_lens": "lenses.trained_lenses",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
