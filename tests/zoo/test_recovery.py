"""Training finds circuits that are known."""

import pytest

from oa_train.metrics.ground_truth import recovery
from oa_train.models.graph import Graph
from oa_train.models.spec import LMSpec
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from oa_train.zoo.known import KNOWN_MODELS, KNOWN_TASKS, write_known
from tests.builders import quiet_trainer


@pytest.mark.long
# Where a part has a backup either of the two will do, so more than one circuit is right.
@pytest.mark.parametrize("name", [name for name in KNOWN_MODELS if name != "backup_induction"])
def test_edges_of_known_models_are_found_and_no_others(name, tmp_path):
    known, lm = write_known(name, tmp_path), LMSpec(str(tmp_path))
    module = CircuitModule(lm=lm, level="edges", penalty_weight=0.04)
    task = KNOWN_TASKS[name](lm=lm, batch_size=8, batches_per_epoch=1000, n_validation=64)
    quiet_trainer(max_steps=1000).fit(module, TaskData(task))
    true = Graph.of(known.model.config).mask(known.edges)
    found = recovery(module.masks.discrete()[0], true, module.masks.keep_probability()[0])
    assert (found.precision, found.recall) == (1.0, 1.0)
    assert found.auroc > 0.999
