"""Training circuits: what is trained, what is not, and that a resume changes nothing."""

from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from oa_train.ablations.constants import Constants, Slots
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.means import value_sums
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource
from oa_train.engine.levels import masked_logits
from oa_train.engine.reading import read_values
from oa_train.errors import CheckpointError, ConfigurationError, NotFiniteError
from oa_train.masks.hard_concrete import HardConcrete
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES, Loss, loss_of
from oa_train.models.families import FAMILIES
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, save_language_model, small_ioi

TABLES = [f"replacements.constants.tables.{kind}_{layer}" for layer in range(3) for kind in ("heads", "mlp")]
STATE = {"masks.distribution.logits", "replacements.prepared", *TABLES}

ARCHETYPES = ("gpt2", "gpt_neox", "llama", "gemma2")
FAMILIES_IN_TURN = [
    name if name in ARCHETYPES else pytest.param(name, marks=pytest.mark.long) for name in sorted(FAMILIES)
]


@pytest.fixture(scope="module", params=FAMILIES_IN_TURN)
def any_lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LMSpec:
    return save_language_model(request.param, tmp_path_factory.mktemp(request.param))


def train(folder: Path, max_steps: int, resume: Path | None = None, **changes) -> CircuitModule:
    trainer_options = {
        key: changes.pop(key) for key in ("accumulate_grad_batches", "limit_train_batches") if key in changes
    }
    module = CircuitModule(**changes)
    trainer = quiet_trainer(
        max_steps=max_steps,
        enable_checkpointing=True,
        plugins=[WholeFileCheckpointIO()],
        callbacks=[BestCheckpoint(folder), LastCheckpoint(folder, every_n_steps=1)],
        **trainer_options,
    )
    data = TaskData(small_ioi(lm=module.lm))
    trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    return module


def test_training_moves_masks_and_constants_and_nothing_else(any_lm):
    task = small_ioi(lm=any_lm)
    module = CircuitModule(lm=any_lm, samples_per_prompt=2)
    frozen = {name: tensor.clone() for name, tensor in module.frozen.state_dict().items()}
    trainer = quiet_trainer(max_steps=5)
    trainer.fit(module, datamodule=TaskData(task))
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert (module.masks.distribution.logits != 1.0).any()
    assert all(table.any() for table in module.replacements.constants.tables.values())
    for name, tensor in module.frozen.state_dict().items():
        assert torch.equal(tensor, frozen[name])
    assert not module.frozen.training
    assert all(parameter.grad is None for parameter in module.frozen.parameters())
    assert set(module.state_dict()) == STATE


def test_training_lowers_the_loss_and_separates_components():
    module = CircuitModule(penalty_weight=0.05, mask_learning_rate=0.1)
    trainer = quiet_trainer(max_steps=100)
    trainer.fit(module, datamodule=TaskData(small_ioi(batch_size=8, batches_per_epoch=100)))
    probability = module.masks.keep_probability()[0]
    assert trainer.callback_metrics["val/kl"] < 0.2
    assert probability.max() > 0.9
    assert probability.min() < 0.1
    assert 4 <= len(module.circuit()) <= 12


def test_constants_start_at_the_means_of_the_means_stream():
    task = small_ioi()
    module = CircuitModule(constants_learning_rate=1e-12, positions=3)
    quiet_trainer(max_steps=1).fit(module, datamodule=TaskData(task))
    batches = task.batches("means", task.n_means, 8)
    means = value_sums(module.frozen, batches, module.level, Slots(3)).means()
    (constants,) = module.replacements.constants.sets()
    assert constants.tables.keys() == means.tables.keys() == module.level.sites.keys()
    for site, table in means.tables.items():
        torch.testing.assert_close(constants.tables[site], table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_ablations_train_the_masks_alone(ablation):
    module = CircuitModule(ablation=ablation)
    quiet_trainer(max_steps=3).fit(module, datamodule=TaskData(small_ioi()))
    assert [group["name"] for group in module.configure_optimizers().param_groups] == ["masks"]
    assert all(bool(table.any()) == (ablation == "mean") for table in module.replacements.constants.tables.values())
    assert (module.masks.distribution.logits != 1.0).any()


def test_a_module_without_a_trainer_says_what_it_needs():
    with pytest.raises(ConfigurationError, match="needs a TaskData datamodule"):
        CircuitModule().circuit()


def test_two_parameter_groups_with_their_learning_rates():
    module = CircuitModule(mask_learning_rate=0.3, constants_learning_rate=0.02)
    groups = {group["name"]: group for group in module.configure_optimizers().param_groups}
    assert groups["masks"]["lr"] == 0.3
    assert groups["constants"]["lr"] == 0.02
    trained = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in module.named_trainables().values())


def test_a_circuit_says_which_masks_it_was_trained_with():
    module = CircuitModule(masks=HardConcrete)
    quiet_trainer(max_steps=1).fit(module, datamodule=TaskData(small_ioi()))
    assert module.circuit().provenance["training"]["masks"] == HardConcrete(2).describe()


def test_components_that_are_not_selected_are_always_kept():
    module = CircuitModule(components=["a*", "!a1.h2"])
    masks = module.masks.sample(few(batch_size=16).batch("train", 0).example_ids)
    untouched = [module.level.index(name) for name in ("m0", "m1", "m2", "a1.h2")]
    assert (masks[:, untouched] == 1).all()
    assert (masks == 0).any(dim=0).sum() == 11
    assert module.masks.discrete()[0][untouched].all()


def test_constants_are_trained_where_something_may_be_ablated():
    module = CircuitModule(components=["a0*", "m1"])
    trained = {
        "masks.distribution.logits",
        *(f"replacements.constants.tables.{site}" for site in ("heads_0", "mlp_1")),
    }
    assert set(module.named_trainables()) == trained


def test_masks_depend_on_the_seed_and_the_prompt_s_number_alone():
    module, task = CircuitModule(samples_per_prompt=3), few()
    whole = module.masks.sample(task.batch("train", 0, 8).example_ids)
    torch.rand(5)
    assert torch.equal(whole, module.masks.sample(task.batch("validation", 0, 8).example_ids))
    halves = [module.masks.sample(task.batch("train", half, 4).example_ids).view(3, 4, -1) for half in (0, 1)]
    assert torch.equal(whole.view(3, 8, -1), torch.cat(halves, dim=1))
    assert not torch.equal(halves[0], halves[1])
    other = CircuitModule(samples_per_prompt=3, seed=1)
    assert not torch.equal(whole, other.masks.sample(task.batch("train", 0, 8).example_ids))
    assert (whole.view(3, 8, -1)[0] != whole.view(3, 8, -1)[1]).any()


class Gradients(Callback):
    """Notes the gradients of every optimiser step."""

    def __init__(self) -> None:
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.steps.append({name: p.grad.clone() for name, p in pl_module.named_trainables().items()})


@pytest.mark.parametrize("masks", [UniformGradientSampling, partial(HardConcrete, initial_logit=0.0)])
def test_accumulated_batches_have_the_gradient_of_one_large_batch(masks):
    noted = []
    for accumulate, size in ((1, 8), (4, 2)):
        gradients = Gradients()
        module = CircuitModule(lm=LMSpec(dtype="float64"), masks=masks, samples_per_prompt=2)
        trainer = quiet_trainer(max_steps=2, accumulate_grad_batches=accumulate, callbacks=[gradients])
        trainer.fit(module, TaskData(few(batch_size=size, batches_per_epoch=8)))
        noted.append(gradients.steps)
    assert len(noted[0]) == len(noted[1]) == 2
    for large, accumulated in zip(*noted, strict=True):
        for name, gradient in large.items():
            assert gradient.abs().max() > 1e-6
            torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, accumulate):
    whole = train(tmp_path / "whole", 8, accumulate_grad_batches=accumulate)
    for step in (3, 5) if accumulate == 1 else (1, 3):  # in an epoch, at the end of one, in the next one
        part = tmp_path / f"part{step}"
        train(part, step, accumulate_grad_batches=accumulate)
        resumed = train(tmp_path / f"rest{step}", 8, part / "last.ckpt", accumulate_grad_batches=accumulate)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), (step, name)
        best = [read_checkpoint(tmp_path / name / "best.ckpt") for name in ("whole", f"rest{step}")]
        assert best[0]["global_step"] == best[1]["global_step"]
        for name, tensor in best[0]["state_dict"].items():
            assert torch.equal(tensor, best[1]["state_dict"][name])


def test_a_resume_is_exact_where_epochs_are_cut_short(tmp_path):
    whole = train(tmp_path / "whole", 8, limit_train_batches=3)
    train(tmp_path / "part", 3, limit_train_batches=3)
    resumed = train(tmp_path / "rest", 8, tmp_path / "part" / "last.ckpt", limit_train_batches=3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_under_another_penalty_the_best_of_the_run_before_does_not_count(tmp_path):
    train(tmp_path / "cheap", 5, penalty_weight=0.01)
    train(tmp_path / "dear", 10, tmp_path / "cheap" / "last.ckpt", penalty_weight=3.0)
    assert read_checkpoint(tmp_path / "dear" / "best.ckpt")["global_step"] > 5


def test_a_checkpoint_holds_the_trainables_and_plain_types_only(tmp_path):
    train(tmp_path, 2)
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert set(checkpoint["state_dict"]) == STATE
    assert (tmp_path / "last.ckpt").stat().st_size < 100_000
    assert not checkpoint.get("hyper_parameters")
    assert checkpoint["oa_train"]["settings"]["penalty_weight"] == 0.05
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"components": "a*"}, "components: the checkpoint has"),
        ({"positions": 4}, "positions: the checkpoint has 1, this configuration 4"),
        ({"lm": LMSpec("tiny", bos="none")}, r"task\.bos_token_id: the checkpoint has"),
        ({"ablation": "mean"}, "ablation: the checkpoint has optimal, this configuration mean"),
        ({"ablation": "resample"}, "ablation: the checkpoint has optimal, this configuration resample"),
        ({"loss": "cross_entropy"}, "loss: the checkpoint has kl, this configuration cross_entropy"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, changes, said):
    train(tmp_path / "first", 1)
    with pytest.raises(CheckpointError, match=said):
        train(tmp_path / "second", 2, tmp_path / "first" / "last.ckpt", **changes)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path / "first", 1)
    other = save_language_model("gpt2", tmp_path / "other")
    module = CircuitModule(lm=other)
    with pytest.raises(CheckpointError, match=r"model\.fingerprint: the checkpoint has"):
        module.check_checkpoint(read_checkpoint(tmp_path / "first" / "last.ckpt"), None)


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    module = train(tmp_path, 1)
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    del checkpoint["state_dict"][TABLES[-1]]
    with pytest.raises(CheckpointError, match=rf"missing \['{TABLES[-1]}'\]"):
        module.check_checkpoint(checkpoint, None)


class Poison(Callback):
    """Makes a constant infinite after some steps, as a learning rate that is far too high would."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            pl_module.replacements.constants.by_site()[Site("mlp", 1)].data.fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    trainer = quiet_trainer(
        max_steps=8,
        enable_checkpointing=True,
        callbacks=[LastCheckpoint(tmp_path, 1), Poison()],
        plugins=[WholeFileCheckpointIO()],
    )
    module = CircuitModule()
    with pytest.raises(NotFiniteError, match="train/kl") as caught:
        trainer.fit(module, datamodule=TaskData(small_ioi()))
    assert caught.value.exit_status == 1
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 3
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_a_frozen_model_that_is_not_finite_is_named_as_the_cause():
    module = CircuitModule(ablation="zero")
    module.frozen.get_output_embeddings().weight.data[3, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="The logits of the frozen model itself are not finite") as caught:
        quiet_trainer(max_steps=1).fit(module, TaskData(small_ioi()))
    assert "learning rates" not in str(caught.value)


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path):
    module = train(tmp_path, 1)
    module.masks.distribution.logits.data[2] = float("inf")
    with pytest.raises(NotFiniteError, match=r"masks\.distribution\.logits"):
        module.on_save_checkpoint({})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"penalty_weight": -0.1}, "penalty_weight is -0.1; expected a price"),
        ({"penalty_weight": float("nan")}, "penalty_weight is nan"),
        ({"threshold": 1.0}, "threshold is 1.0; expected a keep-probability"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ({"mask_learning_rate": 0.0}, "mask_learning_rate is 0.0"),
        ({"components": "a9*"}, "matches no component"),
    ],
)
def test_values_that_cannot_work_are_refused(changes, said):
    with pytest.raises(ConfigurationError, match=said):
        CircuitModule(**changes)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_bare_dataloaders_are_refused_with_a_reason():
    module = CircuitModule()
    with pytest.raises(ConfigurationError, match="needs a TaskData datamodule"):
        quiet_trainer(max_steps=1).fit(module, train_dataloaders=TaskData(small_ioi()).train_dataloader())


ABLATIONS = [name for name, kind in ABLATION_KINDS.items() if not kind.restores]


def few(**changes):
    return small_ioi(**({"batches_per_epoch": 3, "n_validation": 8, "n_means": 16} | changes))


@pytest.mark.parametrize(
    ("ablation", "loss"),
    [*((ablation, "kl") for ablation in ABLATIONS), *(("optimal", loss) for loss in get_args(Loss) if loss != "kl")],
)
def test_every_ablation_and_every_loss_trains(ablation, loss):
    kind, task = ABLATION_KINDS[ablation], few()
    module = CircuitModule(ablation=ablation, loss=loss, samples_per_prompt=2)
    trainer = quiet_trainer(max_steps=3)
    trainer.fit(module, datamodule=TaskData(task))
    figures = trainer.callback_metrics
    assert {f"train/{loss}", "val/objective", *(f"val/{name}" for name in MEASURES)} <= set(figures)
    assert all(value.isfinite() for value in figures.values())
    objective = LOSS_SIGNS[loss] * figures[f"val/{loss}"] + 0.05 * figures["val/size"]
    torch.testing.assert_close(figures["val/objective"], objective)
    trained = LOSS_SIGNS[loss] * figures[f"train/{loss}"] + figures["train/penalty"]
    torch.testing.assert_close(figures["train/loss"], trained)
    assert (module.masks.distribution.logits != 1.0).sum() >= len(module.level) // 2
    assert set(module.named_trainables()) == {"masks.distribution.logits"} | (set(TABLES) if kind.learned else set())
    assert (module.replacements.constants is not None) == kind.constant
    if kind.constant:
        start = kind.prepare(AblationSource(module.frozen, task, module.level))
        (now,) = module.replacements.ablations()
        assert isinstance(start, Constants)
        for site, table in start.tables.items():
            assert torch.equal(now.tables[site], table) != kind.learned


@pytest.mark.parametrize("ablation", ["resample", "noise", "counterfactual", "counterfactual_mean"])
def test_a_resume_in_the_middle_is_exact_under_other_ablations(tmp_path, ablation):
    whole = train(tmp_path / "whole", 7, ablation=ablation)
    train(tmp_path / "part", 3, ablation=ablation)
    resumed = train(tmp_path / "rest", 7, tmp_path / "part" / "last.ckpt", ablation=ablation)
    assert (whole.masks.distribution.logits != 1.0).any()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    best = [read_checkpoint(tmp_path / name / "best.ckpt") for name in ("whole", "rest")]
    assert best[0]["global_step"] == best[1]["global_step"]
    for name, tensor in best[0]["state_dict"].items():
        assert torch.equal(tensor, best[1]["state_dict"][name])


def test_a_checkpoint_without_constants_is_refused_by_another_ablation_without(tmp_path):
    train(tmp_path / "first", 1, ablation="resample")
    with pytest.raises(CheckpointError, match="ablation: the checkpoint has resample, this configuration noise"):
        train(tmp_path / "second", 2, tmp_path / "first" / "last.ckpt", ablation="noise")


@pytest.mark.parametrize("ablation", ["resample", "noise", "counterfactual"])
def test_an_ablation_that_is_not_prepared_says_what_it_needs(ablation):
    module = CircuitModule(ablation=ablation)
    with pytest.raises(ConfigurationError, match=rf"The {ablation} ablation is prepared with .* when a trainer fits"):
        module.replacements.ablations()
    with pytest.raises(ConfigurationError, match="without one, use `ABLATION_KINDS`"):
        module.masked_loss(few().batch("train", 0), torch.zeros(4, 1, 393))


@pytest.mark.parametrize("ablation", ["resample", "noise", "counterfactual_mean"])
def test_validation_and_test_prepare_the_ablation_and_measure_the_circuit(ablation):
    task = few(n_test=8)
    for stage in ("validation", "test"):
        module, trainer = CircuitModule(ablation=ablation), quiet_trainer()
        module.masks.distribution.logits.data[::2] = -3.0
        (trainer.validate if stage == "validation" else trainer.test)(module, TaskData(task), verbose=False)
        masks, kind = module.masks.discrete(), ABLATION_KINDS[ablation]
        assert 0 < masks.sum() < len(module.level)
        prepared = kind.prepare(AblationSource(module.frozen, task, module.level))
        expected = circuit_behaviour(module.frozen, task.batches(stage, 8), module.level, masks, [prepared])
        for name in MEASURES:
            measured = trainer.callback_metrics[f"{'val' if stage == 'validation' else stage}/{name}"]
            torch.testing.assert_close(measured, getattr(expected, name).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ablation", "loss"), [("resample", "kl"), ("noise", "cross_entropy"), ("mean", "logit_difference")]
)
def test_the_masked_loss_is_the_mean_over_samples_that_share_their_prompts_replacements(ablation, loss):
    task = few()
    module = CircuitModule(lm=LMSpec(dtype="float64"), ablation=ablation, loss=loss, samples_per_prompt=3)
    quiet_trainer().validate(module, TaskData(task), verbose=False)
    batch = task.batch("train", 0)
    clean = module.clean_logits(batch)
    mean, _ = module.masked_loss(batch, clean)
    masks = module.masks.sample(batch.example_ids)
    (prepared,), lost = module.replacements.ablations(), []
    for sample in range(3):
        replacements = prepared.replacements(batch, partial(read_values, module.frozen, level=module.level))
        rows = masks[4 * sample : 4 * sample + 4]
        logits = masked_logits(module.frozen, batch, module.level, rows, replacements)
        lost.append(loss_of(loss, clean, logits, batch).mean())
    torch.testing.assert_close(mean[0], sum(lost) / 3, rtol=0, atol=1e-12)


def test_the_last_step_of_an_epoch_has_the_mean_of_the_batches_that_there_are():
    gradients = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            gradients.append(pl_module.masks.distribution.logits.grad.clone())

    for accumulated in (1, 4):
        # Of one batch only: with accumulation it is the whole of an epoch's step.
        trainer = quiet_trainer(
            max_epochs=1, accumulate_grad_batches=accumulated, limit_val_batches=0, callbacks=[Gradients()]
        )
        trainer.fit(CircuitModule(samples_per_prompt=2), TaskData(small_ioi(batches_per_epoch=1)))
    alone, accumulated = gradients
    assert alone.abs().max() > 1e-6
    assert torch.allclose(accumulated, alone, rtol=1e-5, atol=1e-9)
