"""Learned ablations and sparse circuit masks for Hugging Face transformers.

Names are imported when they are first used, so that `import oa_train` is quick and does not import torch or Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from oa_train.ablations.constants import Constants as Constants
    from oa_train.ablations.context import ablated as ablated
    from oa_train.ablations.evaluation import circuit_behaviour as circuit_behaviour
    from oa_train.ablations.fitting import RefitSettings as RefitSettings, fit_constants as fit_constants
    from oa_train.ablations.registry import ABLATION_KINDS as ABLATION_KINDS, AblationSource as AblationSource
    from oa_train.ablations.tracing_constants import TracingConstants as TracingConstants
    from oa_train.ablations.trained_circuit import TrainedCircuit as TrainedCircuit
    from oa_train.ablations.worst_mask import AscentSettings as AscentSettings
    from oa_train.batches import Batch as Batch
    from oa_train.circuits.circuit import Circuit as Circuit, jaccard as jaccard
    from oa_train.circuits.published import published_ioi_circuit as published_ioi_circuit
    from oa_train.engine.forward import scored_logits as scored_logits
    from oa_train.engine.levels import masked_logits as masked_logits
    from oa_train.engine.reading import read_values as read_values
    from oa_train.engine.values import Values as Values
    from oa_train.errors import OaTrainError as OaTrainError
    from oa_train.lenses.trained_lenses import TrainedLenses as TrainedLenses, load_tuned_lens as load_tuned_lens
    from oa_train.masks.hard_concrete import HardConcrete as HardConcrete
    from oa_train.masks.uniform import UniformGradientSampling as UniformGradientSampling
    from oa_train.models.dictionaries import Dictionary as Dictionary, load_dictionary as load_dictionary
    from oa_train.models.graph import Graph as Graph
    from oa_train.models.loading import load_model as load_model
    from oa_train.models.selection import Nodes as Nodes
    from oa_train.models.sites import Site as Site
    from oa_train.models.spec import LMSpec as LMSpec
    from oa_train.studies.compare import Compare as Compare, CompareSettings as CompareSettings
    from oa_train.studies.compare_lenses import (
        CompareLenses as CompareLenses,
        CompareLensesSettings as CompareLensesSettings,
    )
    from oa_train.studies.curve import Curve as Curve, CurveSettings as CurveSettings
    from oa_train.studies.faithfulness import (
        Faithfulness as Faithfulness,
        FaithfulnessSettings as FaithfulnessSettings,
    )
    from oa_train.studies.finish_circuits import FinishSettings as FinishSettings, finish as finish
    from oa_train.studies.finish_constants import finish_constants as finish_constants
    from oa_train.studies.interact import Interact as Interact, InteractSettings as InteractSettings
    from oa_train.studies.lens import LensSettings as LensSettings, ReadPrompt as ReadPrompt
    from oa_train.studies.minimal import Minimal as Minimal, MinimalSettings as MinimalSettings
    from oa_train.studies.robustness import Robustness as Robustness, RobustnessSettings as RobustnessSettings
    from oa_train.studies.run_folder import RunFolder as RunFolder
    from oa_train.studies.scan import Scan as Scan, ScanSettings as ScanSettings
    from oa_train.studies.study import Findings as Findings, Study as Study, Table as Table, estimates as estimates
    from oa_train.studies.sufficient import Sufficient as Sufficient, SufficientSettings as SufficientSettings
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
    from oa_train.tasks.task import Prompt as Prompt, Question as Question, Task as Task
    from oa_train.tasks.text import Text as Text
    from oa_train.training.callbacks import BestCheckpoint as BestCheckpoint, LastCheckpoint as LastCheckpoint
    from oa_train.training.circuit_module import CircuitModule as CircuitModule
    from oa_train.training.constants_module import ConstantsModule as ConstantsModule
    from oa_train.training.data import TaskData as TaskData
    from oa_train.training.interruption import StopAtSignal as StopAtSignal
    from oa_train.training.lens_module import LensModule as LensModule
    from oa_train.training.strategies import ShardedStrategy as ShardedStrategy
    from oa_train.training.tracing_module import TracingModule as TracingModule

# Public names by the module that they are from, as above.
_NAMES = {
    "ablations.worst_mask": ["AscentSettings"],
    "ablations.constants": ["Constants"],
    "ablations.context": ["ablated"],
    "ablations.evaluation": ["circuit_behaviour"],
    "ablations.fitting": ["RefitSettings", "fit_constants"],
    "ablations.registry": ["ABLATION_KINDS", "AblationSource"],
    "ablations.tracing_constants": ["TracingConstants"],
    "ablations.trained_circuit": ["TrainedCircuit"],
    "batches": ["Batch"],
    "circuits.circuit": ["Circuit", "jaccard"],
    "circuits.published": ["published_ioi_circuit"],
    "engine.forward": ["scored_logits"],
    "engine.levels": ["masked_logits"],
    "engine.reading": ["read_values"],
    "engine.values": ["Values"],
    "errors": ["OaTrainError"],
    "lenses.trained_lenses": ["TrainedLenses", "load_tuned_lens"],
    "masks.hard_concrete": ["HardConcrete"],
    "masks.uniform": ["UniformGradientSampling"],
    "models.dictionaries": ["Dictionary", "load_dictionary"],
    "models.graph": ["Graph"],
    "models.loading": ["load_model"],
    "models.selection": ["Nodes"],
    "models.sites": ["Site"],
    "models.spec": ["LMSpec"],
    "studies.compare": ["Compare", "CompareSettings"],
    "studies.compare_lenses": ["CompareLenses", "CompareLensesSettings"],
    "studies.curve": ["Curve", "CurveSettings"],
    "studies.faithfulness": ["Faithfulness", "FaithfulnessSettings"],
    "studies.finish_circuits": ["FinishSettings", "finish"],
    "studies.finish_constants": ["finish_constants"],
    "studies.interact": ["Interact", "InteractSettings"],
    "studies.lens": ["LensSettings", "ReadPrompt"],
    "studies.minimal": ["Minimal", "MinimalSettings"],
    "studies.robustness": ["Robustness", "RobustnessSettings"],
    "studies.run_folder": ["RunFolder"],
    "studies.scan": ["Scan", "ScanSettings"],
    "studies.study": ["Findings", "Study", "Table", "estimates"],
    "studies.sufficient": ["Sufficient", "SufficientSettings"],
    "studies.trace": ["Trace"],
    "studies.trace_settings": ["TraceSettings"],
    "tasks.agreement": ["Agreement"],
    "tasks.capitals": ["Capitals"],
    "tasks.facts": ["Facts"],
    "tasks.grammar": ["GrammarTask"],
    "tasks.greater_than": ["GreaterThan"],
    "tasks.induction": ["Induction"],
    "tasks.ioi": ["IOI"],
    "tasks.records": ["Records"],
    "tasks.synthetic_facts": ["SyntheticFacts"],
    "tasks.task": ["Prompt", "Question", "Task"],
    "tasks.text": ["Text"],
    "training.callbacks": ["BestCheckpoint", "LastCheckpoint"],
    "training.circuit_module": ["CircuitModule"],
    "training.constants_module": ["ConstantsModule"],
    "training.data": ["TaskData"],
    "training.interruption": ["StopAtSignal"],
    "training.lens_module": ["LensModule"],
    "training.strategies": ["ShardedStrategy"],
    "training.tracing_module": ["TracingModule"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
