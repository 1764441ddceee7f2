"""Options of Lightning's trainer: checks that Lightning lacks or makes only during a run, and our defaults."""

from typing import Any

import torch

from oa_train.checks import check_at_least
from oa_train.errors import ConfigurationError
from oa_train.models.loading import with_dtype
from oa_train.models.spec import LMSpec
from oa_train.training.strategies import ShardedStrategy

# The strategy that shards the frozen model; Lightning's strategy of that name would shard the trained tensors as well.
SHARDED = "fsdp"

# Strategies that start processes by multiprocessing.
_OF_NOTEBOOKS = ("ddp_spawn", "ddp_fork", "ddp_notebook")

# Precisions that set the data type of the frozen model, which must be loaded in it.
TRUE_PRECISIONS = {"bf16-true": "bfloat16", "16-true": "float16"}
PRECISIONS = "32-true, bf16-mixed, bf16-true (with --lm.dtype bfloat16) or, on a GPU, 16-mixed"
_PRECISIONS = ("None", "32", "32-true", "bf16-mixed", "16-mixed")

# Smallest values of trainer options that work, for those that Lightning does not check.
_LEAST = {"log_every_n_steps": 0, "accumulate_grad_batches": 1, "gradient_clip_val": 0, "num_nodes": 1}


def check_trainer_options(config: Any, lm: LMSpec) -> None:
    """Make the checks of a trainer's options that Lightning does not make, or only during the run.

    Args:
        config: the options, as attributes.
        lm: model that the module freezes.

    Raises:
        ConfigurationError: an option has a value that cannot work, with this model or at all.
    """
    for name, least in _LEAST.items():
        check_at_least(least, **{f"trainer.{name}": getattr(config, name)})
    _check_precision(config, lm)
    name = config.strategy if isinstance(config.strategy, str) else config.strategy.class_path.rpartition(".")[2]
    if name.startswith(("fsdp_", "deepspeed", "model_parallel", "FSDP", "DeepSpeed", "ModelParallel")):
        raise ConfigurationError(  # before anything is loaded; Lightning may want a GPU for it first
            f"trainer.strategy is {name!r}, which would shard masks and constants as well. For models too large "
            f"for one device there is {SHARDED}, which shards the frozen model; else ddp."
        )
    method = None if isinstance(config.strategy, str) else (config.strategy.get("init_args") or {}).get("start_method")
    if name.startswith(_OF_NOTEBOOKS) or method not in (None, "popen"):
        raise ConfigurationError(
            f"trainer.strategy is {name!r}{f' with start_method {method}' if method else ''}, which is for notebooks: "
            "here its processes would keep running after a signal has ended the first one. Use ddp, its equivalent."
        )


def check_intervals(config: Any, batches_per_epoch: int) -> None:
    """Check that a validation interval in batches fits in an epoch."""
    interval, limit = config.val_check_interval, config.limit_train_batches
    if isinstance(limit, float):
        limit = int(limit * batches_per_epoch)
    length = batches_per_epoch if limit is None else min(batches_per_epoch, limit)
    if isinstance(interval, int) and interval > length and config.check_val_every_n_epoch is not None:
        raise ConfigurationError(
            f"trainer.val_check_interval is {interval}, but an epoch has {length} batches "
            "(data.batches_per_epoch, trainer.limit_train_batches). Lower it, or set trainer.check_val_every_n_epoch "
            "to null."
        )


def check_true_precision(option: str, precision: str, dtype: str) -> None:
    """Check that a "true" precision is the dtype in which the frozen model is loaded."""
    wanted = TRUE_PRECISIONS.get(precision, dtype)
    if dtype != wanted:
        raise ConfigurationError(
            f"{option} is {precision}, a frozen model in {wanted}, and lm.dtype is {dtype}; give --lm.dtype {wanted}. "
            "What is trained is float32 either way."
        )


def trainer_changes(config: Any) -> dict[str, Any]:
    """Arguments of Lightning's trainer that differ from the options."""
    changes: dict[str, Any] = {}
    if config.enable_model_summary is None:
        # The summary lists the frozen model's modules; it is shown on request.
        changes["enable_model_summary"] = False
    if config.precision in TRUE_PRECISIONS:
        # The model has been loaded in this type; Lightning would cast the trained tensors as well.
        changes["precision"] = "32-true"
    if config.strategy == SHARDED:
        changes["strategy"] = ShardedStrategy()
    return changes


def _check_precision(config: Any, lm: LMSpec) -> None:
    precision, dtype = str(config.precision), lm.dtype
    if precision not in (*_PRECISIONS, *TRUE_PRECISIONS):
        raise ConfigurationError(
            f"trainer.precision is {precision!r}; expected {PRECISIONS}. What is trained is always float32; "
            "the data type of the frozen model is --lm.dtype."
        )
    if precision in TRUE_PRECISIONS:
        dtype = with_dtype(lm).dtype
    check_true_precision("trainer.precision", precision, dtype)
    on_gpu = config.accelerator in ("gpu", "cuda") or (config.accelerator == "auto" and torch.cuda.is_available())
    if precision == "16-mixed" and not on_gpu:
        raise ConfigurationError("trainer.precision 16-mixed needs a GPU; on a CPU there is bf16-mixed.")
    if precision == "16-mixed" and config.strategy == SHARDED:
        raise ConfigurationError("trainer.precision 16-mixed does not work with the strategy fsdp; use bf16-mixed.")
