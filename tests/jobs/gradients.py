"""Train two steps in so many processes, and write the gradients of every step.

python -m tests.jobs.gradients FILE PROCESSES BATCH_SIZE DISTRIBUTION [ddp|fsdp] [recompute]
"""

import sys
from functools import partial
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from oa_train.masks.hard_concrete import HardConcrete
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.models.loading import LMSpec
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from oa_train.training.strategies import ShardedStrategy
from tests.builders import small_ioi

DISTRIBUTIONS = {"uniform": UniformGradientSampling, "hard_concrete": partial(HardConcrete, initial_logit=0.0)}

STRATEGIES = {"ddp": DDPStrategy, "fsdp": ShardedStrategy}


class Gradients(Callback):
    """Notes the gradients of every optimiser step, after processes have shared them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.steps.append({name: p.grad.clone() for name, p in pl_module.named_trainables().items()})


def main(file: str, n_processes: str, batch_size: str, distribution: str, strategy: str = "ddp", *more: str) -> None:
    gradients = Gradients()
    module = CircuitModule(
        lm=LMSpec(dtype="float64"),
        masks=DISTRIBUTIONS[distribution],
        samples_per_prompt=2,
        target_size=7,
        recompute="recompute" in more,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(n_processes),
        strategy=STRATEGIES[strategy](process_group_backend="gloo") if n_processes != "1" else "auto",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[gradients],
    )
    trainer.fit(module, TaskData(small_ioi(batch_size=int(batch_size), batches_per_epoch=2, n_validation=7)))
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save({"gradients": gradients.steps, "metrics": metrics}, Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
