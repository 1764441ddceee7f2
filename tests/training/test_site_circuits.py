"""Circuits and constants over every kind of site, at spans, and of features of a sparse dictionary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.testing import assert_close

from oa_train.ablations.constants import Constants
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ArtefactError, CheckpointError, ConfigurationError
from oa_train.models.dictionaries import DictionarySpec, save_dictionary
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, random_dictionary, small_ioi

CUT = 3

SITES: dict[str, dict[str, Any]] = {
    "neurons": {"sites": ["neurons"], "components": ["m0.n1?", "m2"]},
    "attention": {"sites": ["attention"]},
    "residual at spans": {"sites": ["residual"], "components": ["r*@S2", "r*@end"]},
    "tokens and embedding": {"sites": ["tokens", "embedding"]},
    "features": {"sites": ["features"]},
    "nested kinds": {"sites": ["heads", "attention", "neurons", "mlp"], "components": ["a*", "m1", "m2.n?", "m0@S2"]},
}


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory: pytest.TempPathFactory) -> list[DictionarySpec]:
    """Small random dictionaries of two sites of the built-in model."""
    folder = tmp_path_factory.mktemp("dictionaries")
    return [
        DictionarySpec(str(save_dictionary(random_dictionary(site, 24, seed, 64), folder / site)))
        for seed, site in enumerate(("r1", "m2"))
    ]


class Noted(Callback):
    """Notes gradients and losses of every step, and the data types of what is trained."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.dtypes: set[torch.dtype] = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        trained = pl_module.named_trainables()
        self.gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        self.dtypes |= {tensor.dtype for p in trained.values() for tensor in (p, p.grad)}

    def on_train_batch_end(self, trainer, *_) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


class KilledError(Exception):
    pass


class Kill(Callback):
    """Ends a training in the middle of its second epoch."""

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == CUT:
            raise KilledError


def fit(module, folder: Path | None = None, *further: Callback, resume: Path | None = None, **options) -> Noted:
    noted = Noted()
    kept = [BestCheckpoint(folder), LastCheckpoint(folder, every_n_steps=1)] if folder else []
    trainer = quiet_trainer(
        max_epochs=2,
        enable_checkpointing=bool(folder),
        plugins=[WholeFileCheckpointIO()],
        callbacks=[noted, *kept, *further],
        **options,
    )
    task = small_ioi(lm=module.lm, batch_size=3, batches_per_epoch=2, n_validation=4, n_means=8)
    trainer.fit(module, TaskData(task), ckpt_path=None if resume is None else str(resume))
    return noted


def trained_tables(module, selection: torch.Tensor, prefix: str) -> list[str]:
    """Names of the constants of which some are selected."""
    selected = module.level.replaced(~selection.unsqueeze(0))
    return [f"{prefix}.tables.{site.key}" for site, units in selected.items() if units.any()]


@pytest.fixture(params=SITES)
def options(request: pytest.FixtureRequest, dictionaries) -> dict[str, Any]:
    further = {"dictionaries": dictionaries} if request.param == "features" else {}
    return SITES[request.param] | further | {"samples_per_prompt": 2}


def test_a_circuit_is_trained_resumed_and_written(tmp_path, options):
    whole = CircuitModule(**options)
    noted = fit(whole, tmp_path / "whole")
    assert all(torch.tensor(noted.losses).isfinite())
    for name in trained_tables(whole, whole.masks.selection, "replacements.constants"):
        assert any(step[name].abs().max() > 1e-7 for step in noted.gradients), name
    assert any((step["masks.distribution.logits"] != 0).float().mean() > 0.3 for step in noted.gradients)
    assert len(whole.replacements.constants.tables) == len(whole.level.sites)

    with pytest.raises(KilledError):
        fit(CircuitModule(**options), tmp_path / "part", Kill())
    resumed = CircuitModule(**options)
    fit(resumed, tmp_path / "rest", resume=tmp_path / "part" / "last.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

    circuit = whole.circuit(size=whole.masks.n_fixed + 2)
    circuit.save(tmp_path / "circuit")
    loaded = Circuit.load(tmp_path / "circuit")
    assert loaded == circuit
    assert torch.equal(loaded.scores, circuit.scores)
    assert loaded.level.spans == whole.level.spans
    (constants,) = whole.replacements.constants.sets()
    constants.save(tmp_path / "constants")
    read = Constants.load(tmp_path / "constants")
    read.check_fits(loaded.level)
    assert read.slots == constants.slots
    assert all(torch.equal(read.tables[site], table) for site, table in constants.tables.items())


def test_half_precision_is_for_the_model_alone(options):
    exact, half = (fit(CircuitModule(**options), max_steps=2, precision=way) for way in ("32-true", "bf16-mixed"))
    assert half.dtypes == {torch.float32}
    assert half.losses == pytest.approx(exact.losses, rel=0.05)
    assert half.losses != exact.losses


def test_recomputing_has_the_same_gradients(options):
    plain, recomputed = (
        fit(CircuitModule(**options, lm=LMSpec(dtype="float64"), recompute=way), max_steps=2) for way in (False, True)
    )
    for expected, gradients in zip(plain.gradients, recomputed.gradients, strict=True):
        for name, gradient in expected.items():
            assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-9)


ALONE: dict[str, dict[str, Any]] = {
    "neurons": {"sites": ["neurons"], "alone": "m1.n1?"},
    "attention": {"sites": ["attention"], "alone": "*"},
    "residual at spans": {"sites": ["residual"], "alone": ["r*@S2", "r*@end"]},
    "features": {"sites": ["features"], "alone": "f1.?"},
}


@pytest.mark.parametrize("name", ALONE)
def test_units_ablated_alone_are_trained_resumed_and_written(tmp_path, name, dictionaries):
    options = ALONE[name] | ({"dictionaries": dictionaries} if name == "features" else {})
    whole = ConstantsModule(**options)
    noted = fit(whole, tmp_path / "whole")
    assert all(torch.tensor(noted.losses).isfinite())
    assert whole.fitted.best.loss.isfinite().all()
    selection = whole.level.mask(list(whole.circuits))
    trained = trained_tables(whole, selection, "fitted.constants")
    assert sorted(whole.named_trainables()) == sorted(trained)
    for table in trained:
        assert any(step[table].abs().max() > 1e-9 for step in noted.gradients), table

    with pytest.raises(KilledError):
        fit(ConstantsModule(**options), tmp_path / "part", Kill())
    resumed = ConstantsModule(**options)
    fit(resumed, tmp_path / "rest", resume=tmp_path / "part" / "last.ckpt")
    for state, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[state]), state

    best = whole.best_constants()
    best.save(tmp_path / "constants")
    read = Constants.load(tmp_path / "constants")
    read.check_fits(whole.level)
    assert all(torch.equal(read.tables[site], table) for site, table in best.tables.items())
    # Each unit's constants are those that it gets in a job of its own.
    first = next(iter(whole.circuits))
    alone = ConstantsModule(**options | {"alone": [first]})
    fit(alone)
    assert_close(alone.fitted.best.loss[0], whole.fitted.best.loss[0], rtol=1e-4, atol=1e-6)


def test_all_neurons_of_a_layer_are_ablated_alone_in_pieces():
    module = ConstantsModule(sites=["neurons"], alone="m1", rows_per_run=100)
    noted = fit(module, max_steps=1, limit_val_batches=0)
    assert len(module.circuits) == module.level.dimensions.d_mlp
    (gradient,) = noted.gradients[0].values()
    assert gradient.shape == (1, 1, module.level.dimensions.d_mlp, 1)
    assert (gradient != 0).float().mean() > 0.9


def test_constants_at_a_span_do_not_touch_those_at_another():
    module = ConstantsModule(sites=["residual"], alone=["r1@S2", "r2@end"])
    start = ConstantsModule(sites=["residual"], alone=["r1@S2", "r2@end"], learning_rate=1e-12)
    fit(module)
    fit(start)
    spans = module.level.spans
    for site, name in ((Site("residual", 1), "S2"), (Site("residual", 2), "end")):
        differs = module.fitted.constants.by_site()[site] - start.fitted.constants.by_site()[site]
        moved = differs.abs().amax(dim=(0, 2, 3)) > 1e-8
        assert [span for span, of_span in zip(spans, moved.tolist(), strict=True) if of_span] == [name]


def test_a_checkpoint_of_another_dictionary_is_refused(tmp_path, dictionaries):
    module = CircuitModule(sites=["features"], dictionaries=dictionaries[:1])
    fit(module, tmp_path, max_steps=1)
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    CircuitModule(sites=["features"], dictionaries=dictionaries[:1]).check_checkpoint(checkpoint, None)
    folder = save_dictionary(random_dictionary("r1", 24, seed=9, d_model=64), tmp_path / "other")
    other = CircuitModule(sites=["features"], dictionaries=[DictionarySpec(str(folder))])
    with pytest.raises(CheckpointError, match=r"level\.dictionaries: the checkpoint has"):
        other.check_checkpoint(checkpoint, None)


# Penalty weights by kind of site.


def scattered(**options) -> CircuitModule:
    module = CircuitModule(**options)
    logits = module.masks.distribution.logits
    logits.data.normal_(0.0, 1.5, generator=torch.Generator().manual_seed(1))
    return module


def test_the_penalty_by_kind_is_the_sum_over_kinds():
    weights = {"heads": 0.02, "mlp": 0.3}
    module = scattered(penalty_weight=weights)
    probability = module.masks.probabilities()
    by_hand = sum(
        weights["mlp" if name.startswith("m") else "heads"] * probability[0, index]
        for index, name in enumerate(module.level.names)
    )
    penalty = module.penalty(probability)
    assert_close(penalty, by_hand.reshape(1))
    (gradient,) = torch.autograd.grad(penalty.sum(), probability)
    assert gradient[0, module.level.index("a1.h2")] == pytest.approx(0.02, rel=1e-6)
    assert gradient[0, module.level.index("m2")] == pytest.approx(0.3, rel=1e-6)


def test_of_selected_entries_those_are_counted_that_may_be_ablated():
    module = scattered(penalty_weight={"heads": 0.1, "mlp": 0.01}, components=["a1", "m2"])
    probability = module.masks.probabilities()
    assert module.level.kept(module.masks.selection) == ("a1.h0", "a1.h1", "a1.h2", "a1.h3", "m2")
    by_hand = 0.1 * probability[0, :4].sum() + 0.01 * probability[0, 4]
    assert_close(module.penalty(probability), by_hand.reshape(1))


def test_equal_weights_by_kind_are_the_plain_number():
    plain, by_kind = scattered(penalty_weight=0.07), scattered(penalty_weight={"heads": 0.07, "mlp": 0.07})
    first, second = (module.penalty(module.masks.probabilities()) for module in (plain, by_kind))
    assert_close(first, second, rtol=1e-6, atol=0)
    kept = plain.masks.discrete()
    loss = torch.tensor([0.5])
    assert_close(plain.penalty.objective(loss, kept, 2), by_kind.penalty.objective(loss, kept, 2))


@pytest.mark.parametrize("further", [{}, {"target_size": 7, "target_warmup": 1}])
def test_weights_by_kind_are_recorded_and_keep_their_ratio(tmp_path, further):
    weights = {"heads": 0.05, "mlp": 0.2}
    module = CircuitModule(penalty_weight=weights, **further)
    fit(module, tmp_path)
    settings = read_checkpoint(tmp_path / "last.ckpt")["oa_train"]["settings"]
    assert settings["penalty_weight"] == weights
    trainer = quiet_trainer()
    (figures,) = trainer.validate(module, TaskData(small_ioi()), verbose=False)
    circuit = module.circuit()
    assert circuit.provenance["training"]["penalty_weight"] == weights
    probability = module.masks.probabilities()
    (gradient,) = torch.autograd.grad(module.penalty(probability).sum(), probability)
    heads = torch.tensor([name.startswith("a") for name in module.level.names])
    assert_close(gradient[0, ~heads], 4 * gradient[0, heads][:3], rtol=1e-5, atol=0)
    if further:
        assert (module.penalty.weight != 0.2).all()
    else:
        n_heads = sum(name.startswith("a") for name in circuit.names)
        paid = 0.05 * n_heads + 0.2 * (len(circuit) - n_heads)
        assert figures["val/objective"] == pytest.approx(figures["val/kl"] + paid, rel=1e-5)


def test_edges_are_weighted_by_the_kind_of_their_source():
    weights = {"embedding": 0.3, "heads": 0.02, "mlp": 0.1}
    module = scattered(level="edges", penalty_weight=weights)
    probability = module.masks.probabilities()
    kinds = {"i": "embedding", "a": "heads", "m": "mlp"}
    by_hand = sum(weights[kinds[name[0]]] * probability[0, index] for index, name in enumerate(module.level.names))
    assert_close(module.penalty(probability), by_hand.reshape(1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"penalty_weight": {"heads": 0.1}}, r"names the kinds heads; expected .* heads, mlp"),
        (
            {"penalty_weight": {"heads": 0.1, "mlp": 0.1, "neurons": 0.1}},
            r"heads, mlp, neurons; expected .* heads, mlp",
        ),
        ({"penalty_weight": {"heads": 0.1, "mlp": 0.1}, "components": "m*"}, r"that can be ablated: mlp"),
        ({"penalty_weight": {"heads": 0.1, "mlp": -0.1}}, r"penalty_weight is .*; expected a price"),
        ({"penalty_weight": {"heads": 0.1, "mlp": float("nan")}}, r"penalty_weight is .*; expected a price"),
        ({"penalty_weight": {"heads": 0.0, "mlp": 0.0}}, r"no kind of site with a weight above 0"),
        ({"penalty_weight": {}}, r"no kind of site with a weight above 0"),
        (
            {"level": "edges", "penalty_weight": {"heads": 0.1, "mlp": 0.1}},
            r"heads, mlp; expected .* embedding, heads",
        ),
    ],
)
def test_weights_that_do_not_fit_the_kinds_are_refused(options, said):
    with pytest.raises(ConfigurationError, match=said):
        CircuitModule(**options)


# What cannot work, and is refused early.


@pytest.fixture
def without_model(monkeypatch):
    """Fails where a model is loaded."""

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr("oa_train.training.module.load_model", load)


@pytest.mark.usefixtures("without_model")
@pytest.mark.parametrize("made", [CircuitModule, lambda **options: ConstantsModule(alone="*", **options)])
@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"sites": ["features"]},
            ConfigurationError,
            "features, which are those of a dictionary; set dictionaries as well",
        ),
        ({"sites": ["neuron"]}, ConfigurationError, "'neuron'. Did you mean neurons"),
        ({"sites": []}, ConfigurationError, "expected kinds of site, each once"),
        ({"sites": ["mlp", "mlp"]}, ConfigurationError, "expected kinds of site, each once"),
        (
            {"sites": ["features"], "dictionaries": [DictionarySpec("/nowhere/at/all")]},
            ArtefactError,
            "/nowhere/at/all does not exist",
        ),
        ({"dictionaries": [DictionarySpec("/nowhere")]}, ConfigurationError, "without features"),
    ],
)
def test_sites_and_dictionaries_that_cannot_work_are_refused_before_the_model_is_loaded(made, options, error, said):
    with pytest.raises(error, match=said):
        made(**options)


@pytest.mark.usefixtures("without_model")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": "edges", "sites": ["neurons"]}, "level is edges: edges lead from the embedding, heads and MLPs"),
        ({"level": "nodes", "node_penalty": 0.5}, "node_penalty is 0.5, which is for edges"),
        ({"penalty_weight": {"heads": -1.0, "mlp": 0.1}}, "expected a price"),
    ],
)
def test_levels_that_cannot_work_are_refused_before_the_model_is_loaded(options, said):
    with pytest.raises(ConfigurationError, match=said):
        CircuitModule(**options)


def test_a_dictionary_of_another_model_is_refused(tmp_path):
    wide = save_dictionary(random_dictionary("r1", 8, d_model=32), tmp_path / "wide")
    with pytest.raises(ConfigurationError, match=r"has width 32, the model 64"):
        CircuitModule(sites=["features"], dictionaries=[DictionarySpec(str(wide))])
    deep = save_dictionary(random_dictionary("r7", 8, d_model=64), tmp_path / "deep")
    with pytest.raises(ConfigurationError, match=r"no site 'r7' in a model of 3 layers"):
        CircuitModule(sites=["features"], dictionaries=[DictionarySpec(str(deep))])


@pytest.mark.parametrize("option", ["penalty", "graph", "activation_checkpointing"])
def test_options_of_before_are_unknown(option):
    with pytest.raises(TypeError, match=option):
        CircuitModule(**{option: 1})
    with pytest.raises(TypeError, match="activation_checkpointing"):
        ConstantsModule(alone="*", activation_checkpointing=True)
