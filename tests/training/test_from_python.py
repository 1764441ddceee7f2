"""Modules as users of Lightning handle them: loaded from checkpoints, with optimisers of choice, in notebooks."""

import gc
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from oa_train.ablations.evaluation import circuit_logits
from oa_train.errors import CheckpointError, ConfigurationError
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, small_ioi

# Lightning's checkpoint callback says so when a resumed run writes elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def fitted(folder: Path, module, steps: int = 3, resume: Path | None = None, weights_only: bool = False):
    """Train as a notebook does; the checkpoint is Lightning's own, `folder/last.ckpt`."""
    writer = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, save_weights_only=weights_only)
    writer.enable_version_counter = False
    trainer = quiet_trainer(max_steps=steps, enable_checkpointing=True, limit_val_batches=0, callbacks=[writer])
    trainer.fit(module, datamodule=TaskData(small_ioi()), ckpt_path=resume)
    return module


def assert_same_state(first, second) -> None:
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_checkpoint_alone_builds_its_module_again(tmp_path):
    masks = partial(UniformGradientSampling, window_scale=0.5)
    trained = fitted(tmp_path, CircuitModule(components=["a*", "!a0"], masks=masks, penalty_weight=0.2, threshold=0.7))
    loaded = CircuitModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_same_state(trained, loaded)
    assert loaded.masks.distribution.window_scale == 0.5
    (circuit,), (expected,) = loaded.trained_circuits(), trained.trained_circuits()
    assert circuit.circuit.names == expected.circuit.names
    assert circuit.circuit.provenance == expected.circuit.provenance
    assert circuit.circuit.provenance["task"]["name"] == "ioi"


def test_constants_are_loaded_likewise(tmp_path):
    trained = fitted(tmp_path, ConstantsModule(keep=["m*", "a1"], learning_rate=0.02), weights_only=True)
    loaded = ConstantsModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_same_state(trained, loaded)
    assert loaded.learning_rate == 0.02
    with pytest.raises(CheckpointError, match="no training can go on"):
        fitted(tmp_path / "on", loaded, 5, tmp_path / "last.ckpt")


def test_what_contradicts_a_checkpoint_is_refused(tmp_path):
    fitted(tmp_path, CircuitModule(), 1)
    path = tmp_path / "last.ckpt"
    with pytest.raises(CheckpointError, match="components: the checkpoint has"):
        CircuitModule.load_from_checkpoint(path, components="a*")
    with pytest.raises(CheckpointError, match="of the module CircuitModule; expected one of ConstantsModule"):
        ConstantsModule.load_from_checkpoint(path)
    with pytest.raises(ConfigurationError, match=r"no argument 'component'.*components"):
        CircuitModule.load_from_checkpoint(path, component="a*")
    with pytest.raises(ConfigurationError, match="weights_only is False"):
        CircuitModule.load_from_checkpoint(path, weights_only=False)


def test_groups_of_an_optimiser_that_contradict_the_module_are_refused(tmp_path):
    fitted(tmp_path, CircuitModule(), 1)
    content = read_checkpoint(tmp_path / "last.ckpt")
    content["optimizer_states"][0]["param_groups"][0]["params"] = [0, 1]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"groups of \[2, 6\] tensors; this module trains groups of \[1, 6\]"):
        fitted(tmp_path / "on", CircuitModule(), 2, tmp_path / "other.ckpt")


def test_memory_does_not_grow_with_steps():
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    class Count(Callback):
        counts: ClassVar[list[int]] = []

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step in (10, 60):
                self.counts.append(tensors())

    module = CircuitModule(samples_per_prompt=1, target_size=7, target_warmup=5)
    trainer = quiet_trainer(max_steps=60, limit_val_batches=0, callbacks=[Count()])
    trainer.fit(module, datamodule=TaskData(small_ioi(batch_size=1, batches_per_epoch=60)))
    first, last = Count.counts
    assert last <= first


def test_trust_is_never_taken_from_a_checkpoint(tmp_path):
    fitted(tmp_path, CircuitModule(), 1)
    content = read_checkpoint(tmp_path / "last.ckpt")
    content["oa_train"]["settings"]["lm"]["trust_remote_code"] = True
    torch.save(content, tmp_path / "other.ckpt")
    assert not CircuitModule.load_from_checkpoint(tmp_path / "other.ckpt").lm.trust_remote_code
    content["oa_train"]["settings"]["positions"] = "many"
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(CheckpointError, match="build no CircuitModule"):
        CircuitModule.load_from_checkpoint(tmp_path / "damaged.ckpt")


def test_predictions_are_logits_of_the_circuits_on_the_test_prompts():
    module, task = CircuitModule(penalty_weight=[0.1, 0.2]), small_ioi()
    with torch.no_grad():
        module.masks.distribution.logits[:6] = -1.0
    batches = quiet_trainer().predict(module, datamodule=TaskData(task))
    logits = torch.cat(batches, dim=1)
    assert logits.shape == (2, task.n_test, 1, module.frozen.config.vocab_size)
    (batch,) = task.batches("test", 3)
    masks = module.masks.discrete()
    assert masks[0].sum() == len(module.level) - 6
    expected = circuit_logits(module.frozen, batch, module.level, masks, module.replacements.ablations())
    torch.testing.assert_close(logits[:, :3], expected.view(2, 3, 1, -1), atol=1e-4, rtol=1e-4)


def options(optimizer=None):
    optimizer = optimizer or partial(AdamW, weight_decay=0.1)
    return {"optimizer": optimizer, "lr_scheduler": partial(CosineAnnealingLR, T_max=6)}


@pytest.mark.parametrize("kind", [CircuitModule, partial(ConstantsModule, keep="m*")])
def test_a_resume_with_another_optimiser_and_schedule_is_exact(tmp_path, kind):
    whole = fitted(tmp_path / "whole", kind(**options()), 6)
    fitted(tmp_path / "part", kind(**options()), 3)
    assert_same_state(whole, fitted(tmp_path / "rest", kind(**options()), 6, tmp_path / "part" / "last.ckpt"))
    groups = read_checkpoint(tmp_path / "part" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert [group["lr"] for group in groups] == pytest.approx([group["initial_lr"] / 2 for group in groups])
    with pytest.raises(CheckpointError, match="was trained with AdamW, CosineAnnealingLR; this configuration has SGD"):
        fitted(tmp_path / "other", kind(**options(SGD)), 6, tmp_path / "part" / "last.ckpt")


def test_a_changed_rate_scales_what_a_schedule_made_of_the_old_one(tmp_path):
    fitted(tmp_path, CircuitModule(**options()), 3)
    module = CircuitModule(mask_learning_rate=0.1, **options())
    fitted(tmp_path / "rest", module, 4, tmp_path / "last.ckpt")
    masks, constants = module.trainer.optimizers[0].param_groups
    assert masks["lr"] == pytest.approx(2 * 10 * constants["lr"])


def test_an_optimiser_that_cannot_be_built_is_a_mistake_of_the_configuration():
    module = CircuitModule(optimizer=partial(SGD, momentum=-1.0))
    with pytest.raises(ConfigurationError, match="cannot be built: Invalid momentum"):
        module.configure_optimizers()


@pytest.mark.parametrize("plugins", [[], [WholeFileCheckpointIO()]])
def test_a_notebook_gets_what_its_process_has_trained(plugins):
    module = CircuitModule(seed=3)
    trainer = quiet_trainer(max_steps=2, strategy="ddp_fork", devices=1, plugins=plugins, limit_val_batches=0)
    trainer.fit(module, datamodule=TaskData(small_ioi()))
    alone = CircuitModule(seed=3)
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(alone, datamodule=TaskData(small_ioi()))
    assert_same_state(module, alone)
    assert module.trained_circuits()[0].circuit.provenance["task"] == small_ioi().describe()


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", [partial(CircuitModule, target_size=7, target_warmup=1), partial(ConstantsModule, keep="m*")]
)
def test_processes_that_are_spawned_hand_back_all_that_they_have_trained(tmp_path, kind):
    module, task = kind(seed=3), small_ioi(n_validation=8, n_means=8, batches_per_epoch=2)
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/objective")
    callbacks = [best, ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)]
    options = {"strategy": "ddp_spawn", "devices": 2, "enable_checkpointing": True, "callbacks": callbacks}
    trainer = quiet_trainer(max_steps=3, **options)
    trainer.fit(module, datamodule=TaskData(task))
    trained_class = type(module)
    assert_same_state(module, trained_class.load_from_checkpoint(tmp_path / "steps/step=3.ckpt"))
    loaded = trained_class.load_from_checkpoint(best.best_model_path)
    figures = read_checkpoint(Path(best.best_model_path))["oa_train"]["figures"]
    assert {name: figure.item() for name, figure in trainer.callback_metrics.items()}.keys() >= figures.keys()
    for trained in (module, loaded):
        assert trained.trained_circuits()[0].circuit.provenance["task"] == task.describe()
