"""Tracing constants as a Lightning job: every run by itself, resumable, never worse than the mean embedding."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.tracing import CORRUPTED, corrupted_by_constants, probability_lost, tokens_level
from oa_train.ablations.tracing_constants import TracingConstants
from oa_train.engine.reading import read_values
from oa_train.errors import ArtefactError, CheckpointError, ConfigurationError
from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint
from oa_train.training.checkpoints import WholeFileCheckpointIO
from oa_train.training.data import TaskData
from oa_train.training.tracing_module import TracingModule
from tests.builders import quiet_trainer, small_ioi, tiny_model

SUBJECT = {"subject": "S2", "at": ["-1", "S2_last"], "windows": [1]}


def train(steps: int, folder: Path | None = None, resume: Path | None = None, task=None, **changes) -> TracingModule:
    module = TracingModule(**SUBJECT | changes)
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


def test_runs_are_trained_as_if_each_were_alone():
    together = train(2)
    alone = train(2, restore="mlp", at="S2_last")
    numbers = [together.tracing.runs.index(run) for run in alone.tracing.runs]
    assert_close(together.constants[[*numbers, -1]], alone.constants, rtol=0, atol=1e-6)
    assert_close(together.best.loss[[*numbers, -1]], alone.best.loss, rtol=0, atol=1e-6)


def test_the_last_token_may_be_a_number_as_yaml_reads_it():
    assert TracingModule(**SUBJECT | {"at": [-1, "S2_last"]}).tracing == TracingModule(**SUBJECT).tracing


def test_pieces_change_nothing():
    whole, parts = (train(2, rows_per_run=rows).constants for rows in (512, 5))
    assert_close(parts, whole, rtol=0, atol=1e-6)


def test_the_start_is_the_mean_embedding_of_the_subjects():
    module, task = train(1, learning_rate=1e-12), small_ioi()
    (batch,) = task.batches("means", task.n_means)
    values = read_values(module.frozen, batch, tokens_level(module.frozen.config, "S2"))[CORRUPTED][:, :, 0]
    mean = values[batch.spans["S2"]].mean(dim=0)
    assert_close(module.constants.detach(), mean.expand_as(module.constants), rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_the_probability_that_is_lost():
    spec = LMSpec(dtype="float64")
    module, task = TracingModule(lm=spec, **SUBJECT), small_ioi(lm=spec)
    batch = task.batch("train", 0)
    with torch.no_grad():
        torch.nn.init.normal_(module.constants, std=0.3, generator=torch.Generator().manual_seed(0))
    (piece,) = module.tracer.pieces(batch)
    probabilities = piece.probabilities(slice(None), module.constants[:, None, None])
    loss = probability_lost(piece.clean, probabilities).mean(dim=1).sum()
    (expected,) = torch.autograd.grad(loss, module.constants)
    assert (expected.abs().amax(dim=1) > 0).sum() > 6
    noted = []
    module.on_before_optimizer_step = lambda _: noted.append(module.constants.grad.clone())
    module.on_fit_start = lambda: None
    module.tracer.rows_per_run = 6
    quiet_trainer(max_steps=1, limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=TaskData(task))
    assert_close(noted[0], expected, rtol=1e-5, atol=1e-7)


def test_the_best_by_validation_is_never_worse_than_the_mean():
    still, wild = train(1, learning_rate=1e-12).best.loss, train(2, learning_rate=50.0).best.loss
    assert (wild <= still + 1e-6).all()
    trained = train(15, learning_rate=0.05).best.loss
    assert (trained <= still + 1e-6).all()
    assert trained.mean() < still.mean() - 0.001


def test_a_resumed_job_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path):
    whole = train(4, tmp_path / "whole")

    class StoppedError(Exception):
        pass

    class Interrupted(TracingModule):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 6:
                raise StoppedError

    Interrupted.__name__ = "TracingModule"
    callbacks = [BestCheckpoint(tmp_path / "part"), LastCheckpoint(tmp_path / "part", every_n_steps=1)]
    trainer = quiet_trainer(
        max_epochs=3, limit_train_batches=4, enable_checkpointing=True, callbacks=callbacks,
        plugins=[WholeFileCheckpointIO()],
    )  # fmt: skip
    with pytest.raises(StoppedError):
        trainer.fit(Interrupted(**SUBJECT), datamodule=TaskData(small_ioi()))
    resumed = train(4, tmp_path / "resumed", resume=tmp_path / "part" / "last.ckpt")
    expected = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(expected[name], tensor), name


def test_a_checkpoint_of_other_runs_is_refused(tmp_path):
    train(1, tmp_path)
    loaded = TracingModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.tracing.spans == ("-1", "S2_last")
    with pytest.raises(CheckpointError, match="tracing"):
        train(1, tmp_path / "other", resume=tmp_path / "last.ckpt", windows=[3])


def test_the_constants_are_saved_and_read_back(tmp_path):
    module = train(2)
    module.tracing_constants("run").save(tmp_path)
    loaded = TracingConstants.load(tmp_path)
    assert loaded.tracing == module.tracing
    loaded.check_belongs(load_model(LMSpec()))
    with pytest.raises(ArtefactError, match="The tracing constants belong to tiny"):
        loaded.check_belongs(tiny_model("llama"))
    task = small_ioi()
    (batch,) = task.batches("validation", task.n_validation)
    clean = torch.cat([piece.clean for piece in module.tracer.pieces(batch)])
    probabilities = module.tracer.probabilities(batch, corrupted_by_constants(loaded.table))
    assert_close(probability_lost(clean, probabilities).mean(dim=1), module.best.loss, rtol=1e-4, atol=1e-6)
    with pytest.raises(ArtefactError, match="has no tracing constants"):
        TracingConstants.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"restore": ["heads"]}, "restore names 'heads'"),
        ({"windows": [2]}, "windows names 2"),
        ({"layers": [5]}, r"layers is \[5\]; expected ascending numbers from 0 to 2"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_what_cannot_work_is_refused(changes, words):
    with pytest.raises(ConfigurationError, match=words):
        TracingModule(**SUBJECT | changes)
