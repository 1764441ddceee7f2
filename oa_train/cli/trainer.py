"""What is asked of Lightning's trainer: checks of its options that Lightning lacks, or makes after the run began."""

from pathlib import Path
from typing import Any

import torch

from oa_train.cli.arguments import check_output
from oa_train.cli.messages import PRECISIONS, TRUE_PRECISIONS, check_true_precision
from oa_train.errors import ConfigurationError
from oa_train.training.strategies import ShardedStrategy

DEFAULT_ROOT = "runs"

# The strategy that shares out the frozen model; Lightning's of that name would share out what is trained as well.
SHARDED = "fsdp"

_PRECISIONS = ("None", "32", "32-true", "bf16-mixed", "16-mixed")

# Smallest numbers of the trainer that work; -1 is without limit.
_LEAST = {
    "max_epochs": -1,
    "max_steps": -1,
    "log_every_n_steps": 0,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "num_nodes": 1,
}


def check_trainer(chosen: Any) -> None:
    """Check what Lightning would not, or only after the run has begun."""
    config = chosen.trainer
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value < least:
            raise ConfigurationError(f"trainer.{name} is {value}; expected {least} or more.")
    if str(config.devices).strip("-").isdigit() and int(config.devices) < 1 and int(config.devices) != -1:
        raise ConfigurationError(f"trainer.devices is {config.devices}; expected 1 or more, -1 for all, or auto.")
    _check_precision(chosen)
    _check_strategy(config.strategy)
    if ".." in Path(chosen.experiment).parts or Path(chosen.experiment).is_absolute() or not chosen.experiment:
        raise ConfigurationError(
            f"experiment is {chosen.experiment!r}; expected a name, which becomes a folder below "
            "trainer.default_root_dir."
        )
    check_output("trainer.default_root_dir", str(config.default_root_dir or DEFAULT_ROOT))


def check_intervals(config: Any, batches_per_epoch: int) -> None:
    """Check that a validation interval in batches fits into an epoch."""
    every, limit = config.val_check_interval, config.limit_train_batches
    length = batches_per_epoch
    if limit is not None:
        length = min(length, limit) if isinstance(limit, int) else int(length * limit)
    if isinstance(every, int) and every > length and config.check_val_every_n_epoch is not None:
        raise ConfigurationError(
            f"trainer.val_check_interval is {every}, but an epoch has {length} batches "
            "(data.batches_per_epoch, trainer.limit_train_batches). Lower it, or set trainer.check_val_every_n_epoch "
            "to null."
        )


def trainer_changes(config: Any) -> dict[str, Any]:
    """Where Lightning's trainer is given something else than what was written.

    Args:
        config: the trainer's options, checked.
    """
    changes: dict[str, Any] = {}
    if config.enable_model_summary is None:
        # It lists the frozen model's modules; it is shown when it is asked for.
        changes["enable_model_summary"] = False
    if config.precision in TRUE_PRECISIONS:
        # The model has been loaded in this type; Lightning would cast what is trained as well.
        changes["precision"] = "32-true"
    if config.strategy == SHARDED:
        changes["strategy"] = ShardedStrategy()
    return changes


def _check_precision(chosen: Any) -> None:
    config, precision, dtype = chosen.trainer, str(chosen.trainer.precision), chosen.lm.dtype
    if precision not in (*_PRECISIONS, *TRUE_PRECISIONS):
        raise ConfigurationError(
            f"trainer.precision is {precision!r}; expected {PRECISIONS}. What is trained is always float32; "
            "the data type of the frozen model is --lm.dtype."
        )
    check_true_precision("trainer.precision", precision, dtype)
    on_gpu = config.accelerator in ("gpu", "cuda") or (config.accelerator == "auto" and torch.cuda.is_available())
    if precision == "16-mixed" and not on_gpu:
        raise ConfigurationError("trainer.precision 16-mixed needs a GPU; on a CPU there is bf16-mixed.")
    if precision == "16-mixed" and config.strategy == SHARDED:
        raise ConfigurationError("trainer.precision 16-mixed does not go with the strategy fsdp; use bf16-mixed.")


def _check_strategy(strategy: Any) -> None:
    """Refuse, before anything is loaded, what the module would refuse later."""
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    if name.startswith(("fsdp_", "deepspeed", "model_parallel", "FSDP", "DeepSpeed", "ModelParallel")):
        raise ConfigurationError(
            f"trainer.strategy is {name!r}, which would share out masks and constants as well. For models too large "
            f"for one device there is {SHARDED}, which shares out the frozen model; else ddp."
        )
