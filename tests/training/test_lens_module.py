"""Lenses as a Lightning job: all layers side by side, resumable, never worse than their start."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from oa_train.errors import CheckpointError, ConfigurationError
from oa_train.lenses.predictions import Tokens, lens_logits
from oa_train.lenses.trained_lenses import TrainedLenses
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.spec import LMSpec
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint
from oa_train.training.checkpoints import WholeFileCheckpointIO
from oa_train.training.compatibility import check_trainer
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.data import TaskData
from oa_train.training.lens_module import LensModule
from oa_train.training.strategies import ShardedStrategy
from oa_train.training.tracing_module import TracingModule
from tests.builders import quiet_trainer, small_ioi


def train(steps: int, folder: Path | None = None, resume: Path | None = None, task=None, **changes) -> LensModule:
    module = LensModule(**changes)
    trainer = quiet_trainer(
        max_epochs=3,
        limit_train_batches=steps,
        enable_checkpointing=bool(folder),
        plugins=[WholeFileCheckpointIO()],
        callbacks=[BestCheckpoint(folder), LastCheckpoint(folder, every_n_steps=1)] if folder else [],
    )
    data = TaskData(task or small_ioi())
    trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    return module


def tensors(module: LensModule) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_trainables().items()}


def test_lenses_and_layers_are_trained_as_if_each_were_alone():
    together = tensors(train(3, lenses=["oca", "tuned"]))
    alone = tensors(train(3, lenses=["tuned"], layers=[1]))
    assert_close(together["lenses.tuned.weight"][1:2], alone["lenses.tuned.weight"], rtol=0, atol=1e-6)
    constants = tensors(train(3, lenses=["oca"], layers=[2]))
    assert_close(together["lenses.oca.constants"][2:3], constants["lenses.oca.constants"], rtol=0, atol=1e-6)


def test_pieces_of_the_predictions_change_nothing():
    options = {"lenses": ["oca", "tuned", "linear_oca", "oca_shared"]}
    whole, parts = (tensors(train(2, predictions_at_once=most, **options)) for most in (1024, 6))
    for name, tensor in whole.items():
        assert_close(parts[name], tensor, rtol=0, atol=2e-6)


def test_the_gradient_is_that_of_the_mean_over_prompts():
    module, task = LensModule(lm=LMSpec(dtype="float64"), lenses=["oca"]), small_ioi(lm=LMSpec(dtype="float64"))
    batch = task.batch("train", 0)
    with torch.no_grad():
        torch.nn.init.normal_(module.lenses["oca"].constants, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(module.frozen, batch)
    logits = lens_logits(module.lenses["oca"], module.frozen, tokens, slice(None))
    loss = tokens.by_prompt(kl_divergence(tokens.logits, logits)).mean(dim=1).sum()
    (expected,) = torch.autograd.grad(loss, module.lenses["oca"].constants)
    module.predictions_at_once = 7
    trainer = quiet_trainer(max_steps=1, limit_train_batches=1, limit_val_batches=0)
    noted = []
    module.on_before_optimizer_step = lambda _: noted.append(module.lenses["oca"].constants.grad.clone())
    module.on_fit_start = lambda: None
    trainer.fit(module, datamodule=TaskData(task))
    assert_close(noted[0], expected, rtol=1e-5, atol=1e-7)


def test_the_best_by_validation_is_never_worse_than_the_start():
    wild = train(2, lenses=["oca", "tuned"], learning_rates={"oca": 30.0, "tuned": 3.0})
    losses = wild.validation_losses()
    still = train(1, lenses=["oca", "tuned"], learning_rates={"oca": 1e-12, "tuned": 1e-12}).validation_losses()
    for kind, loss in losses.items():
        assert (loss <= still[kind] + 1e-5).all()
    trained = train(10, lenses=["oca", "tuned"], learning_rates={"oca": 0.01, "tuned": 0.003}).validation_losses()
    assert (trained["oca"][:2] < still["oca"][:2]).all()
    assert (trained["tuned"] < still["tuned"]).all()


@pytest.mark.parametrize("epoch_end", [True, False])
def test_a_resumed_job_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, epoch_end):
    options = {"lenses": ["oca", "linear_oca", "oca_shared"]}
    whole = train(4, tmp_path / "whole", **options)

    class StoppedError(Exception):
        pass

    class Interrupted(LensModule):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == (8 if epoch_end else 6):
                raise StoppedError

    Interrupted.__name__ = "LensModule"
    module = Interrupted(**options)
    callbacks = [BestCheckpoint(tmp_path / "part"), LastCheckpoint(tmp_path / "part", every_n_steps=1)]
    trainer = quiet_trainer(
        max_epochs=3, limit_train_batches=4, enable_checkpointing=True, callbacks=callbacks,
        plugins=[WholeFileCheckpointIO()],
    )  # fmt: skip
    with pytest.raises(StoppedError):
        trainer.fit(module, datamodule=TaskData(small_ioi()))
    resumed = train(4, tmp_path / "resumed", resume=tmp_path / "part" / "last.ckpt", **options)
    state, expected = resumed.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_a_checkpoint_holds_the_lenses_alone_and_is_refused_by_other_ones(tmp_path):
    module = train(2, tmp_path, lenses=["oca"])
    loaded = LensModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(loaded.lenses["oca"].constants, module.lenses["oca"].constants)
    assert not any(name.startswith("frozen.") for name in module.state_dict())
    with pytest.raises(CheckpointError, match="lenses"):
        train(2, tmp_path / "other", resume=tmp_path / "last.ckpt", lenses=["tuned"])


def test_the_trained_lenses_are_the_best_ones(tmp_path):
    module = train(3, lenses=["oca", "tuned"], layers=[0, 2])
    trained = module.trained_lenses("run")
    trained.save(tmp_path)
    loaded = TrainedLenses.load(tmp_path)
    task = small_ioi()
    (batch,) = task.batches("validation", task.n_validation)
    tokens = Tokens(module.frozen, batch)
    for kind, lens in loaded.lenses.items():
        kl = kl_divergence(tokens.logits, lens_logits(lens, module.frozen, tokens, slice(None)))
        assert_close(tokens.by_prompt(kl).mean(dim=1), module.validation_losses()[kind], rtol=1e-4, atol=1e-6)


def test_in_bfloat16_what_is_trained_stays_float32():
    spec = LMSpec(dtype="bfloat16")
    module = train(2, lm=spec, lenses=["oca", "tuned"], task=small_ioi(lm=spec))
    assert {tensor.dtype for tensor in tensors(module).values()} == {torch.float32}
    assert all(torch.isfinite(loss).all() for loss in module.validation_losses().values())


@pytest.mark.parametrize("kind", [LensModule, TracingModule])
def test_a_sharded_model_is_refused(kind):
    trainer = quiet_trainer(max_steps=1, strategy=ShardedStrategy(process_group_backend="gloo"))
    assert not kind.shardable
    with pytest.raises(ConfigurationError, match="Module cannot train with a sharded model"):
        check_trainer(trainer, kind.__name__, kind.keeps_best, kind.shardable)
    check_trainer(trainer, "ConstantsModule", ConstantsModule.keeps_best, ConstantsModule.shardable)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lenses": ["tunned"]}, "lenses names 'tunned'"),
        ({"lenses": ["linear_oca"]}, "name that too"),
        ({"layers": [3]}, r"layers is \[3\]; expected ascending numbers from 0 to 2"),
        ({"learning_rates": {"linear_oca": 0.1}}, "learning_rates names 'linear_oca'"),
        ({"learning_rates": {"oca": 0.0}}, "oca is 0.0; expected more than 0"),
        ({"predictions_at_once": 0}, "predictions_at_once is 0"),
    ],
)
def test_what_cannot_work_is_refused(changes, words):
    with pytest.raises(ConfigurationError, match=words):
        LensModule(**changes)
