"""The strategy that shares out the frozen model, and those that are refused."""

import lightning
import pytest
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from oa_train.errors import ConfigurationError
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.compatibility import check_strategy
from oa_train.training.data import TaskData
from oa_train.training.strategies import ShardedStrategy
from tests.builders import quiet_trainer, small_ioi


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_share_out_what_is_trained_are_refused(strategy):
    with pytest.raises(ConfigurationError, match=r"--trainer\.strategy fsdp"):
        check_strategy(strategy())
    check_strategy(ShardedStrategy())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_that_casts_what_is_trained_is_refused(precision):
    with pytest.raises(ConfigurationError, match="always float32"):
        quiet_trainer(precision=precision, max_steps=1).fit(CircuitModule(), TaskData(small_ioi()))


def test_the_built_in_choice_of_a_trainer_is_accepted():
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(CircuitModule(samples_per_prompt=1), TaskData(small_ioi()))
    assert isinstance(trainer, lightning.Trainer)
