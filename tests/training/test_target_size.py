"""Training to a target size: it is reached, resumes are exact, and checkpoints of other penalties are refused."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from oa_train.errors import CheckpointError, ConfigurationError
from oa_train.masks.hard_concrete import HardConcrete
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, small_ioi

# Runs are short here; one test expects this warning.
pytestmark = pytest.mark.filterwarnings("ignore:The circuit shrinks to target_size")


def train(folder: Path, max_steps: int, resume: Path | None = None, accumulate: int = 1, **changes) -> CircuitModule:
    module = CircuitModule(**({"target_size": 6, "target_warmup": 4} | changes))
    trainer = quiet_trainer(
        max_steps=max_steps,
        enable_checkpointing=True,
        plugins=[WholeFileCheckpointIO()],
        callbacks=[BestCheckpoint(folder), LastCheckpoint(folder, every_n_steps=1)],
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, datamodule=TaskData(small_ioi()), ckpt_path=None if resume is None else str(resume))
    return module


def train_to_size(
    folder: Path,
    target: int,
    seed: int,
    steps: int,
    warmup: int,
    masks=UniformGradientSampling,
    batch_size=16,
    **changes,
):
    """Train as configs/circuit_nodes_tiny.yaml does; sizes of the last state and of the best checkpoint."""
    options = {"masks": masks, "seed": seed, "target_size": target, "target_warmup": warmup} | changes
    module = CircuitModule(penalty_weight=0.12, **options)
    sizes = {"batch_size": batch_size, "batches_per_epoch": 50, "n_validation": 64}
    data = TaskData(small_ioi(seed=seed, **sizes))
    trainer = quiet_trainer(max_steps=steps, enable_checkpointing=True, callbacks=[BestCheckpoint(folder)])
    trainer.fit(module, datamodule=data)
    last = int(module.masks.discrete()[0].sum())  # the masks' own size
    module.load_state_dict(read_checkpoint(folder / "best.ckpt")["state_dict"], strict=False)
    assert len(module.circuit(size=3)) == 3
    return last, len(module.circuit())


def test_a_run_ends_near_the_target(tmp_path):
    last, best = train_to_size(tmp_path, target=7, seed=0, steps=100, warmup=50, batch_size=8, mask_learning_rate=0.1)
    assert abs(last - 7) <= 1
    assert best == 7


@pytest.mark.long
@pytest.mark.parametrize("masks", [UniformGradientSampling, HardConcrete])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("target", [5, 7, 10])
def test_every_run_ends_near_its_target(tmp_path, masks, target, seed):
    last, best = train_to_size(tmp_path, target, seed, steps=500, warmup=200, masks=masks)
    assert abs(last - target) <= 1
    assert best == target


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, accumulate):
    whole = train(tmp_path / "whole", 7, accumulate=accumulate)
    assert whole.penalty.weight != 0.05
    for step in (2, 5) if accumulate == 1 else (2,):  # in the warm-up, and after it
        part = tmp_path / f"part{step}"
        train(part, step, accumulate=accumulate)
        resumed = train(tmp_path / f"rest{step}", 7, part / "last.ckpt", accumulate)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), (step, name)
    assert {"penalty.log_weight", "penalty.excess", "penalty.steps"} <= set(whole.state_dict())


class Weights(Callback):
    """Notes the penalty weight and its step count after every batch."""

    def __init__(self) -> None:
        self.noted: list[tuple[int, int, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.noted.append((trainer.global_step, int(pl_module.penalty.steps), float(pl_module.penalty.weight)))


def test_the_weight_moves_once_in_an_optimiser_step_and_is_logged():
    weights = Weights()
    module = CircuitModule(target_size=6)
    trainer = quiet_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=[weights])
    trainer.fit(module, datamodule=TaskData(small_ioi(batches_per_epoch=8)))
    assert [step for step, _, _ in weights.noted] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert all(step == updates for step, updates, _ in weights.noted)
    assert len({weight for _, _, weight in weights.noted}) == 5
    # Logged is the weight that entered the loss, that is, the one before the last update.
    assert trainer.callback_metrics["train/penalty_weight"].item() == pytest.approx(weights.noted[-2][2])


def test_the_best_checkpoint_minimises_the_objective_of_the_target():
    module = CircuitModule(target_size=6)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module, datamodule=TaskData(small_ioi(batches_per_epoch=2)))
    metrics = trainer.callback_metrics
    assert metrics["val/size"] == module.discrete().sum() == 6
    assert module.masks.discrete().sum() == 15  # two steps close no mask
    assert metrics["val/objective"] == metrics["val/kl"]


def test_the_circuit_of_a_target_has_the_highest_keep_probabilities():
    module = CircuitModule(target_size=[4, 9.2])
    with torch.no_grad():
        module.masks.distribution.logits.copy_(torch.linspace(-3, 3, 30))
    assert module.discrete().sum(dim=1).tolist() == [4, 9]
    assert module.discrete()[0].nonzero().flatten().tolist() == [11, 12, 13, 14]


def test_a_checkpoint_of_another_kind_of_penalty_is_refused(tmp_path):
    train(tmp_path / "target", 1)
    with pytest.raises(CheckpointError, match="penalty_kind: the checkpoint has TargetSize, this configuration SizeP"):
        train(tmp_path / "weight", 2, tmp_path / "target" / "last.ckpt", target_size=None)


def test_with_another_target_the_best_of_the_run_before_does_not_count(tmp_path):
    train(tmp_path / "first", 5)
    settings = read_checkpoint(tmp_path / "first" / "last.ckpt")["oa_train"]["settings"]
    assert (settings["target_size"], settings["target_warmup"], settings["penalty_weight"]) == (6, 4, 0.05)
    train(tmp_path / "second", 10, tmp_path / "first" / "last.ckpt", target_size=4)
    assert read_checkpoint(tmp_path / "second" / "best.ckpt")["global_step"] > 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_size": 0.0}, "target_size is 0.0; expected more than 0"),
        ({"target_size": float("nan")}, "target_size is nan"),
        ({"target_size": 16}, "target_size is 16; expected more than 0 and at most 15"),
        ({"target_size": 3, "components": "a*"}, "target_size is 3; expected more than 3 and at most 15.*3 that are"),
        ({"target_size": 7, "target_warmup": 0}, "target_warmup is 0; expected more than 0"),
        ({"target_size": 7, "penalty_weight": 0.0}, "penalty_weight is 0; with target_size"),
    ],
)
def test_targets_that_cannot_work_are_refused(changes, said):
    with pytest.raises(ConfigurationError, match=said):
        CircuitModule(**changes)


def test_a_training_that_is_too_short_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="in 4 steps and then settles; this training has 7 steps"):
        train(tmp_path, 7)
    with warnings.catch_warnings(record=True) as caught:
        train(tmp_path / "longer", 8)
    assert not [warning for warning in caught if "target_size" in str(warning.message)]
