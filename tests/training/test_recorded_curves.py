"""Recorded trainings of the built-in model: the first 50 steps of each kind, which no change of the code may move.

A difference means that something computes other numbers than before. Either that is a fault, or it is meant: then
record anew (`python -m tests.training.test_recorded_curves`) and say in the commit why.
"""

import json
from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
from lightning.pytorch.loggers import CSVLogger

from oa_train import IOI, CircuitModule, ConstantsModule, TaskData
from oa_train.masks.hard_concrete import HardConcrete
from tests.builders import quiet_trainer

RECORDED = Path(__file__).parent / "recorded" / "curves.json"
STEPS = 50

CASES: dict[str, Callable[[], lightning.LightningModule]] = {
    "nodes": lambda: CircuitModule(penalty_weight=0.12),
    "edges": lambda: CircuitModule(level="edges", penalty_weight=0.006),
    "front": lambda: CircuitModule(level="edges", penalty_weight=[0.0015, 0.006, 0.04]),
    "constants": lambda: ConstantsModule(alone="*"),
    "nodes_resample_target": lambda: CircuitModule(ablation="resample", target_size=7, target_warmup=25),
    "nodes_positions_hard_concrete": lambda: CircuitModule(
        positions=6, masks=HardConcrete, components=["a*.h*", "m1"]
    ),
    "edges_noise_node_penalty": lambda: CircuitModule(
        level="edges", ablation="noise", node_penalty=0.5, loss="cross_entropy"
    ),
}


class Curve(lightning.Callback):
    """Keeps the figures of every step."""

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer, *_) -> None:
        for name in ("train/loss", "train/kl", "train/cross_entropy", "train/penalty", "train/size"):
            if name in trainer.logged_metrics:
                self.columns.setdefault(name, []).append(float(trainer.logged_metrics[name]))


def curve(name: str, folder: Path) -> dict[str, list[float]]:
    kept = Curve()
    trainer = quiet_trainer(
        max_steps=STEPS,
        max_epochs=1,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=CSVLogger(folder),
        callbacks=[kept],
    )
    task = IOI(batch_size=4, batches_per_epoch=STEPS, n_validation=64, n_means=256)
    trainer.fit(CASES[name](), datamodule=TaskData(task))
    return kept.columns


@pytest.mark.parametrize("name", CASES)
def test_the_first_steps_are_those_that_were_recorded(name, tmp_path):
    recorded = json.loads(RECORDED.read_text())[name]
    found = curve(name, tmp_path)
    assert found.keys() == recorded.keys()
    for figure, values in recorded.items():
        assert len(found[figure]) == STEPS
        # On another processor sums are taken in another order, and 50 steps of Adam magnify that.
        assert found[figure] == pytest.approx(values, rel=1e-5, abs=1e-5), figure
