"""Checks for trainer options that would change or break the trained tensors."""

from lightning import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from oa_train.errors import ConfigurationError
from oa_train.training.strategies import ShardedStrategy


def check_trainer(trainer: Trainer, module: str, keeps_best: bool, shardable: bool) -> None:
    """Refuse options of a trainer that cannot work for the class `module`; see `FrozenModelModule` for its properties.

    Raises:
        ConfigurationError: validations would be 0 batches or epochs apart; a callback cannot average the module; or
            the strategy or precision would change the trained tensors.
    """
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        if getattr(trainer, name) == 0:
            raise ConfigurationError(f"trainer.{name} is 0; expected more (limit_val_batches 0: no validation).")
    for callback in vars(trainer)["callbacks"]:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            name = type(callback).__name__
            if keeps_best:
                raise ConfigurationError(f"{module} keeps the best parameters, not averages; leave {name} out.")
            if getattr(callback, "_use_buffers", False):
                raise ConfigurationError(f"{name} would average counters and flags too; set its use_buffers to false.")
    check_strategy(trainer.strategy)
    if isinstance(trainer.strategy, ShardedStrategy) and not shardable:
        raise ConfigurationError(
            f"{module} cannot train with a sharded model, which all processes must run the same number of times. Use "
            "ddp, with lm.dtype bfloat16 if the model is large."
        )
    precision = trainer.precision_plugin
    if isinstance(precision, (HalfPrecision, DoublePrecision)):
        raise ConfigurationError(
            f"precision is {precision.precision!r}, which would change the data type of the trained tensors; that is "
            "always float32. The data type of the frozen model is lm.dtype, with precision 32-true."
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that shard or wrap trained tensors.

    Raises:
        ConfigurationError: the strategy is one of them.
    """
    sharding = isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy))
    if sharding and not isinstance(strategy, ShardedStrategy):
        raise ConfigurationError(
            f"The strategy {type(strategy).__name__} would shard masks and constants as well, or not "
            "synchronise gradients. For models too large for one device use "
            "oa_train.training.strategies.ShardedStrategy (--trainer.strategy fsdp), else ddp."
        )
