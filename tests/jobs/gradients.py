"""Train two steps of several circuits in so many processes, and write the gradients of every step.

python -m tests.jobs.gradients FILE PROCESSES BATCH_SIZE CIRCUIT[:fsdp[:recompute]] ...

A dictionary stands in the folder `dictionary` beside the file.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from oa_train.masks.hard_concrete import HardConcrete
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.spec import LMSpec
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.data import TaskData
from oa_train.training.lens_module import LensModule
from oa_train.training.module import FrozenModelModule
from oa_train.training.strategies import ShardedStrategy
from oa_train.training.tracing_module import TracingModule
from tests.builders import small_ioi

CIRCUITS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "hard_concrete": {"masks": partial(HardConcrete, initial_logit=0.0)},
    "spans": {"sites": ["residual"], "components": ["r*@S2", "r*@end"], "target_size": 3},
    "features": {"sites": ["features"], "target_size": 20},
}

OTHERS: dict[str, partial[FrozenModelModule]] = {
    "constants": partial(ConstantsModule, alone=["m*", "a1*"], rows_per_run=16),
    "lens": partial(LensModule, lenses=["oca", "tuned", "linear_oca"], predictions_at_once=16),
    "tracing": partial(TracingModule, subject="S2", windows=[1], rows_per_run=16),
}


class Gradients(Callback):
    """Notes the gradients of every optimiser step, after processes have shared them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.steps.append({name: p.grad.clone() for name, p in pl_module.named_trainables().items()})


def train(
    dictionary: Path, n_processes: int, batch_size: int, circuit: str, strategy: str = "ddp", *more: str
) -> dict[str, Any]:
    """Train a circuit, lenses or tracing constants; their gradients and metrics."""
    gradients = Gradients()
    module: FrozenModelModule
    if circuit in OTHERS:
        module = OTHERS[circuit](lm=LMSpec(dtype="float64"))
    else:
        options = {"target_size": 7, "samples_per_prompt": 2} | CIRCUITS[circuit]
        if circuit == "features":
            options["dictionaries"] = [DictionarySpec(str(dictionary))]
        module = CircuitModule(lm=LMSpec(dtype="float64"), recompute="recompute" in more, **options)
    made = ShardedStrategy if strategy == "fsdp" else DDPStrategy
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=n_processes,
        strategy=made(process_group_backend="gloo") if n_processes > 1 else "auto",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[gradients],
    )
    trainer.fit(module, TaskData(small_ioi(batch_size=batch_size, batches_per_epoch=2, n_validation=7)))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"gradients": gradients.steps, "metrics": metrics}


def command() -> None:
    """Train what the words of the command line say."""
    file, n_processes, batch_size, *cases = sys.argv[1:]
    dictionary = Path(file).parent / "dictionary"
    results = {case: train(dictionary, int(n_processes), int(batch_size), *case.split(":")) for case in cases}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(results, Path(file))


if __name__ == "__main__":
    command()
