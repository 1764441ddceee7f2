"""Constants alone as a Lightning job: the same as `fit_constants`, resumable, stopped when flat."""

from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ArtefactError, CheckpointError, ConfigurationError
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.sites import Site
from oa_train.studies.finish_constants import finish_constants
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, small_ioi


def train(max_steps: int, folder: Path | None = None, resume: Path | None = None, **changes) -> ConstantsModule:
    module = ConstantsModule(**changes)
    callbacks = [BestCheckpoint(folder), LastCheckpoint(folder, every_n_steps=1)] if folder else []
    trainer = quiet_trainer(
        max_epochs=3,
        limit_train_batches=max_steps,
        enable_checkpointing=bool(folder),
        plugins=[WholeFileCheckpointIO()],
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=TaskData(small_ioi()), ckpt_path=None if resume is None else str(resume))
    return module


def table(module: ConstantsModule, kind: str, layer: int) -> torch.Tensor:
    """What is trained at a site: [circuit, slot, unit, width]."""
    return module.fitted.constants.by_site()[Site(kind, layer)].detach()


def moved(module: ConstantsModule, start: ConstantsModule) -> list[str]:
    """Names of the units whose constants differ."""
    before, now = start.fitted.constants.by_site(), module.fitted.constants.by_site()
    differs = [(now[site] - before[site]).abs().amax(dim=(0, 1, 3)) > 1e-9 for site in module.level.sites]
    return list(module.level.kept(torch.cat(differs)))


def constants_of(module: ConstantsModule, name: str) -> torch.Tensor:
    """What is trained for one head or MLP."""
    layer, _, head = name[1:].partition(".h")
    return table(module, "heads", int(layer))[0, :, int(head)] if head else table(module, "mlp", int(layer))[0, :, 0]


def assert_same_tables(first: ConstantsModule, second: ConstantsModule, tolerance: float = 0.0) -> None:
    others = second.fitted.constants.tables
    for name, expected in first.fitted.constants.tables.items():
        assert_close(others[name], expected, rtol=0, atol=tolerance)


def test_all_components_in_one_job_equal_a_job_for_each():
    together = train(2, alone="*")
    assert list(together.circuits) == list(together.level.names)
    for name in ("a0.h0", "m0", "a2.h3"):
        index = together.level.names.index(name)
        alone = train(2, alone=name)
        assert_close(constants_of(together, name), constants_of(alone, name), rtol=0, atol=1e-5)
        assert_close(together.fitted.best.loss[index], alone.fitted.best.loss[0], rtol=0, atol=1e-5)


def test_circuits_run_in_parts_are_the_same():
    whole, parts = (train(2, alone=["a0*", "m*"], rows_per_run=rows) for rows in (512, 8))
    assert_same_tables(whole, parts, 1e-5)


def test_the_best_by_validation_is_kept_and_never_worse_than_mean_and_zero():
    module = train(4, alone=["a0.h0", "m0", "m1"], learning_rate=0.02)
    task = small_ioi()
    batches = list(task.batches("validation", task.n_validation))
    sets = module.fitted.best.sets()
    behaviour = circuit_behaviour(module.frozen, batches, module.level, module.fitted.masks, sets)
    assert_close(behaviour.kl.mean(dim=1), module.fitted.best.loss, rtol=0, atol=1e-6)
    for start in ("mean", "zero"):
        unmoved = train(1, alone=["a0.h0", "m0", "m1"], start=start, learning_rate=1e-9)
        assert (module.fitted.best.loss <= unmoved.fitted.best.loss + 1e-6).all()
    wild = train(2, alone=["a0.h0", "m0", "m1"], learning_rate=100.0)
    assert (wild.fitted.best.loss <= unmoved.fitted.best.loss + 1e-6).all()


def test_constants_of_components_alone_stand_in_one_table(tmp_path):
    module = train(2, alone="*")
    constants = module.best_constants()
    assert constants.provenance["ablation"] == "optimal"
    findings = finish_constants(module.frozen, small_ioi(), module.trained_circuits(), tmp_path).findings
    assert [row["component"] for row in findings.rows] == list(module.level.names)
    loaded = Constants.load(tmp_path / "constants")
    assert loaded.provenance["bos_token_id"] == small_ioi().bos_token_id
    assert all(torch.equal(loaded.tables[site], expected) for site, expected in constants.tables.items())
    assert not (tmp_path / "circuit").exists()
    assert (findings.folder / "tables" / "constants.csv").is_file()
    assert (findings.folder / "figures" / "components.png").stat().st_size > 5_000


@pytest.mark.parametrize("options", [{"num_sanity_val_steps": 2}, {"limit_val_batches": 1}])
def test_a_look_at_part_of_the_prompts_is_not_taken_for_all(options):
    task = small_ioi(evaluation_batch_size=4, n_validation=16)
    module = ConstantsModule(alone="*")
    quiet_trainer(max_epochs=2, limit_train_batches=2, **options).fit(module, datamodule=TaskData(task))
    n_prompts = 4 if "limit_val_batches" in options else 16
    batches = list(task.batches("validation", n_prompts))
    sets = module.fitted.best.sets()
    behaviour = circuit_behaviour(module.frozen, batches, module.level, module.fitted.masks, sets)
    assert_close(behaviour.kl.mean(dim=1), module.fitted.best.loss, rtol=0, atol=1e-6)


def test_validation_before_the_fit_does_no_harm():
    module, data = ConstantsModule(alone=["a0*", "m0"]), TaskData(small_ioi())
    quiet_trainer().validate(module, data, verbose=False)
    quiet_trainer(max_epochs=1, limit_train_batches=2).fit(module, datamodule=data)
    plain = ConstantsModule(alone=["a0*", "m0"])
    quiet_trainer(max_epochs=1, limit_train_batches=2).fit(plain, datamodule=data)
    assert_same_tables(module, plain)


def test_without_validation_the_last_constants_are_kept():
    module = ConstantsModule(alone="m0")
    quiet_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(module, TaskData(small_ioi()))
    assert torch.equal(module.best_constants().tables[Site("mlp", 0)], table(module, "mlp", 0)[0])
    with pytest.raises(ConfigurationError, match="patience counts validations"):
        quiet_trainer(max_epochs=1, limit_val_batches=0).fit(
            ConstantsModule(alone="m0", patience=1), TaskData(small_ioi())
        )


def test_a_resume_uses_the_learning_rate_it_is_given(tmp_path):
    train(2, tmp_path / "first", alone="m0")
    resumed = ConstantsModule(alone="m0", learning_rate=1e-12)
    trainer = quiet_trainer(
        max_epochs=4,
        limit_train_batches=2,
        enable_checkpointing=True,
        plugins=[WholeFileCheckpointIO()],
        callbacks=[BestCheckpoint(tmp_path / "second")],
    )
    before = read_checkpoint(tmp_path / "first" / "last.ckpt")["state_dict"]["fitted.constants.tables.mlp_0"]
    trainer.fit(resumed, TaskData(small_ioi()), ckpt_path=str(tmp_path / "first" / "last.ckpt"))
    assert_close(table(resumed, "mlp", 0), before, rtol=0, atol=1e-9)


def test_a_circuit_from_names_and_from_a_file_is_the_same(tmp_path):
    named = train(2, keep=["a0*", "a1*", "m0"])
    finish_constants(named.frozen, small_ioi(), named.trained_circuits(), tmp_path / "run")
    assert Circuit.load(tmp_path / "run" / "circuit").nodes == named.circuits["circuit"].nodes
    for folder in (tmp_path / "run", tmp_path / "run" / "circuit"):
        loaded = train(2, circuit=str(folder))
        assert_same_tables(loaded, named)
    continued = ConstantsModule(keep=["a0*", "a1*", "m0"], start=str(tmp_path / "run"), positions=3)
    quiet_trainer(max_epochs=1, limit_train_batches=1).fit(continued, datamodule=TaskData(small_ioi()))
    assert continued.best_constants().n_positions == 3
    assert continued.fitted.best.loss <= named.fitted.best.loss + 1e-6


def test_only_constants_of_what_is_ablated_move():
    module = train(2, keep=["*", "!a1.h2", "!m0"])
    start = train(1, keep=["*", "!a1.h2", "!m0"], learning_rate=1e-12)
    assert moved(module, start) == ["m0", "a1.h2"]


def test_a_resumed_job_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path):
    class Kill(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise KeyError("killed")

    whole = train(2, tmp_path / "whole", alone=["a0*", "m1"])
    module = ConstantsModule(alone=["a0*", "m1"])
    part = tmp_path / "part"
    trainer = quiet_trainer(
        max_epochs=3,
        limit_train_batches=2,
        enable_checkpointing=True,
        plugins=[WholeFileCheckpointIO()],
        callbacks=[BestCheckpoint(part), LastCheckpoint(part, every_n_steps=1), Kill()],
    )
    with pytest.raises(KeyError, match="killed"):
        trainer.fit(module, datamodule=TaskData(small_ioi()))
    rest = train(2, tmp_path / "rest", part / "last.ckpt", alone=["a0*", "m1"])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name]), name


def test_a_checkpoint_of_other_circuits_is_refused(tmp_path):
    train(1, tmp_path, alone=["a0*"])
    with pytest.raises(CheckpointError, match="another experiment"):
        train(1, tmp_path / "other", tmp_path / "last.ckpt", alone=["a1*"])
    with pytest.raises(CheckpointError, match="loss: the checkpoint has kl"):
        train(1, tmp_path / "other", tmp_path / "last.ckpt", alone=["a0*"], loss="cross_entropy")


def test_training_ends_early_when_nothing_improves():
    module = ConstantsModule(alone=["a2*"], learning_rate=1e-9, patience=2)
    trainer = quiet_trainer(max_epochs=20, limit_train_batches=1)
    trainer.fit(module, datamodule=TaskData(small_ioi()))
    assert trainer.current_epoch < 5


def test_the_learning_rate_falls_to_zero_over_the_whole_training():
    rates = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = quiet_trainer(max_epochs=2, limit_train_batches=4, callbacks=[Watch()])
    trainer.fit(ConstantsModule(alone="m0", learning_rate=0.1), datamodule=TaskData(small_ioi()))
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[4] == pytest.approx(0.05)
    assert rates[-1] < 0.01
    endless = quiet_trainer(max_epochs=-1)
    with pytest.raises(ConfigurationError, match="needs an end"):
        endless.fit(ConstantsModule(alone="m0"), datamodule=TaskData(small_ioi()))


def test_every_start_and_loss_is_honoured():
    zero = train(1, alone="m0", start="zero", learning_rate=1e-12)
    assert table(zero, "mlp", 0).abs().max() < 1e-9
    mean = train(1, alone="m0", start="mean", learning_rate=1e-12)
    counterfactual = train(1, alone="m0", start="counterfactual_mean", learning_rate=1e-12)
    assert not torch.equal(table(mean, "mlp", 0), table(counterfactual, "mlp", 0))
    for loss in ("cross_entropy", "logit_difference"):
        module = train(4, alone="a0.h0", loss=loss, learning_rate=0.05)
        start = train(1, alone="a0.h0", loss=loss, learning_rate=1e-12)
        assert (module.fitted.best.loss < start.fitted.best.loss).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "exactly one of .* given: none"),
        ({"keep": "m0", "alone": "*"}, "given: keep, alone"),
        ({"alone": "b*"}, "matches no component"),
        ({"alone": []}, "selects no component"),
        ({"alone": "!m0"}, "selects no component"),
        ({"keep": "*"}, "keeps everything: there are no constants to train"),
        ({"alone": "*", "start": "maen"}, "Did you mean mean"),
        ({"alone": "*", "start": "resample"}, "not a folder of constants either"),
        ({"alone": "*", "positions": 0}, "positions is 0"),
        ({"alone": "*", "patience": 0}, "patience is 0"),
        ({"alone": "*", "learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"alone": "*", "rows_per_run": 0}, "rows_per_run is 0"),
        ({"circuit": "here", "sites": ["neurons"]}, "circuit is 'here', whose own sites and dictionaries are used"),
        ({"circuit": "here", "dictionaries": [DictionarySpec("there")]}, "leave sites and dictionaries out"),
    ],
)
def test_what_cannot_work_is_refused(changes, words):
    with pytest.raises(ConfigurationError, match=words):
        ConstantsModule(**changes)


def test_artefacts_of_another_model_are_refused(tmp_path):
    level = ConstantsModule(alone="m0").level
    circuit = replace(Circuit.from_patterns(level, ["m0"]), provenance={"fingerprint": "0"})
    circuit.save(tmp_path / "circuit")
    with pytest.raises(ArtefactError, match="belongs to another model"):
        ConstantsModule(circuit=str(tmp_path / "circuit"))
    with pytest.raises(ArtefactError):
        ConstantsModule(circuit=str(tmp_path / "nothing"))


def test_a_circuit_found_under_another_ablation_is_optimally_ablated_from_now_on(tmp_path):
    trained = Circuit.from_patterns(ConstantsModule(alone="m0").level, ["a*", "m0"])
    replace(trained, provenance={"ablation": "resample", "selected": ["m1"]}).save(tmp_path / "found")
    module = train(1, circuit=str(tmp_path / "found"))
    finish_constants(module.frozen, small_ioi(), module.trained_circuits(), tmp_path / "run")
    loaded = TrainedCircuit.load(tmp_path / "run")
    assert loaded.ablation == "optimal"
    assert loaded.constants is not None
    assert loaded.seed == 0
    assert loaded.circuit.provenance["selected"] == ["m1"]
    with pytest.raises(ConfigurationError, match="belong to no circuit"):
        ConstantsModule(alone="m0").circuit()


def test_constants_of_a_circuit_of_edges_replace_the_embedding_too(tmp_path):
    task = small_ioi()
    graph = Graph.of(load_model(task.lm).config)
    mask = torch.rand(1, len(graph), generator=torch.Generator().manual_seed(0)) < 0.5
    Circuit.from_mask(graph, graph.prune(mask)[0]).save(tmp_path / "circuit")
    module = ConstantsModule(circuit=str(tmp_path / "circuit"), start="zero")
    quiet_trainer(max_steps=2).fit(module, TaskData(task))
    assert module.fitted.constants.by_site()[Site("embedding")].abs().sum() > 0
    other = Circuit(graph, graph.names[:40])
    assert other.nodes != Circuit.load(tmp_path / "circuit").names
    ablated = len(graph) - len(Circuit.load(tmp_path / "circuit"))
    assert module.describe()["ablated"]["circuit"].startswith(f"{ablated} entries, ")
