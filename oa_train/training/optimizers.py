"""The optimiser and learning-rate schedule that a configuration names, and the learning rates after a resume."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from oa_train.ablations.fitting import cosine_decay
from oa_train.errors import ConfigurationError
from oa_train.training.steps import planned_steps

# Lightning's types of these names, without the deprecated alias of Callable.
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


def configured(
    make_optimizer: OptimizerCallable, make_schedule: LRSchedulerCallable | None, groups: Sequence[Mapping[str, Any]]
) -> Optimizer | dict[str, Any]:
    """The optimiser, or a dictionary of it and its schedule, in the form that Lightning takes.

    A schedule moves on after every optimiser step, but `ReduceLROnPlateau` after every epoch, by its monitor or by
    `val/objective`. Without one rates are constant. Groups without parameters are left out.

    Raises:
        ConfigurationError: the optimiser or the schedule refuses its arguments or the groups.
    """
    try:
        optimizer = make_optimizer([dict(group) for group in groups if group["params"]])
        schedule = None if make_schedule is None else make_schedule(optimizer)
    except (TypeError, ValueError) as problem:
        raise ConfigurationError(f"optimizer or lr_scheduler cannot be built: {problem}") from problem
    if schedule is None:
        return optimizer
    options: dict[str, Any] = {"scheduler": schedule, "interval": "step"}
    if isinstance(schedule, ReduceLROnPlateau):
        options |= {"interval": "epoch", "monitor": getattr(schedule, "monitor", "val/objective")}
    return {"optimizer": optimizer, "lr_scheduler": options}


def decaying_to_zero(module: Any, optimizer: Optimizer) -> LambdaLR:
    """Schedule of a module's learning rates: cosine decay to zero over the whole training.

    Raises:
        ConfigurationError: nothing ends the training.
    """
    n_steps = planned_steps(module.trainer, module.data.epoch_length)
    if not math.isfinite(n_steps):
        raise ConfigurationError(
            "The learning rate falls to zero over the training, which therefore needs an end: give "
            "trainer.max_epochs or trainer.max_steps, or another lr_scheduler."
        )
    return LambdaLR(optimizer, lambda step: cosine_decay(step, n_steps))


def restore_rates(optimizer: Optimizer, configs: Sequence[Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Set the configured learning rates where they differ from those that a checkpoint has just restored.

    Rates that a schedule has changed are multiplied by the ratio of the two, so that unchanged rates stay as they are.
    The `groups` have the rates that are wanted, the `configs` are Lightning's, of the schedules.
    """
    rates = [group["lr"] for group in groups if group["params"]]
    schedules = [config.scheduler for config in configs]
    # Nested schedules hold the rates as well.
    schedules += [inner for schedule in schedules for inner in getattr(schedule, "_schedulers", [])]
    for number, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
        before = group.get("initial_lr")
        if not schedules or before is None:
            group["lr"] = rate
        elif before != rate:
            group["lr"] *= rate / before
            group["initial_lr"] = rate
        for schedule in schedules:
            if hasattr(schedule, "base_lrs"):
                schedule.base_lrs[number] = rate
            if isinstance(schedule, LambdaLR) and schedule is schedules[0]:
                # A function of the step is not stored, and may have changed with the length of the training.
                group["lr"] = rate * schedule.lr_lambdas[number](schedule.last_epoch)
