"""Training circuits of edges, one or several side by side."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.testing import assert_close

from oa_train.ablations.registry import AblationSource
from oa_train.engine.forward import scored_logits
from oa_train.errors import CheckpointError, ConfigurationError
from oa_train.masks.hard_concrete import HardConcrete
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.models.families import FAMILIES
from oa_train.models.graph import Graph
from oa_train.models.pruning import without_dangling
from oa_train.models.spec import LMSpec
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint
from oa_train.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from oa_train.training.strategies import ShardedStrategy
from tests.builders import quiet_trainer, save_language_model, small_ioi

EDGES = {"level": "edges", "samples_per_prompt": 2}

ARCHETYPES = ("gpt2", "gpt_neox", "llama", "gemma2")
FAMILIES_IN_TURN = [
    name if name in ARCHETYPES else pytest.param(name, marks=pytest.mark.long) for name in sorted(FAMILIES)
]


def train(folder, max_steps: int, resume=None, accumulate: int = 1, **changes) -> CircuitModule:
    module = CircuitModule(**EDGES | changes)
    trainer = quiet_trainer(
        max_steps=max_steps,
        enable_checkpointing=True,
        plugins=[WholeFileCheckpointIO()],
        callbacks=[BestCheckpoint(folder), LastCheckpoint(folder, every_n_steps=1)],
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, datamodule=TaskData(small_ioi()), ckpt_path=None if resume is None else str(resume))
    return module


@pytest.mark.parametrize("family", FAMILIES_IN_TURN)
def test_training_moves_masks_and_constants_of_every_source(family, tmp_path):
    lm = save_language_model(family, tmp_path / "lm")
    module = CircuitModule(lm=lm, **EDGES)
    frozen = {name: tensor.clone() for name, tensor in module.frozen.state_dict().items()}
    trainer = quiet_trainer(max_steps=3)
    trainer.fit(module, datamodule=TaskData(small_ioi(lm=lm)))
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert len(module.masks.distribution.logits) == len(Graph.of(module.frozen.config))
    assert (module.masks.distribution.logits != 1.0).float().mean() > 0.5
    for table in module.replacements.constants.tables.values():
        assert table.requires_grad
        assert table.abs().sum() > 0
    for name, tensor in module.frozen.state_dict().items():
        assert torch.equal(tensor, frozen[name])


def test_sampled_masks_have_no_edge_that_dangles_and_no_gradient_to_one():
    module = CircuitModule(**EDGES)
    module.masks.distribution.logits.data.normal_(-1.5, 1.5, generator=torch.Generator().manual_seed(0))
    batch = small_ioi().batch("train", 0, 16)
    masks = module.masks.sample(batch.example_ids)
    bare = module.masks.distribution.sample(module.masks._uniform(batch.example_ids))
    lasting = without_dangling(module.level, bare > 0)
    assert torch.equal(masks > 0, lasting)
    assert_close(masks, bare * lasting)
    assert (bare > 0).sum() > 1.2 * (masks > 0).sum()
    # An entry's gradient is averaged over the rows in which it has an effect.
    (gradient,) = torch.autograd.grad(masks.sum(), module.masks.distribution.logits)
    inside = (masks > 0) & (masks < 1)
    theta = module.masks.distribution.keep_probability()
    expected = torch.where(inside.any(dim=0), len(masks) * theta * (1 - theta), 0.0)
    assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-6)


def test_edges_that_are_not_selected_are_always_kept_and_count():
    module = CircuitModule(components=["a*", "!a*->logits"], **EDGES)
    graph = module.level
    drawn = module.masks.sample(small_ioi().batch("train", 0, 8).example_ids)
    fixed = ~graph.mask(graph.select(["a*", "!a*->logits"]))
    assert (drawn[:, fixed] == 1).all()
    assert module.masks.keep_probability()[0, fixed].eq(1).all()
    module.masks.distribution.logits.data.fill_(-5.0)
    assert torch.equal(module.masks.above_threshold()[0], fixed)
    assert torch.equal(module.masks.discrete(), without_dangling(graph, fixed.unsqueeze(0)))


def test_nothing_is_lost_where_every_edge_is_kept():
    module = CircuitModule(**EDGES)
    module.masks.distribution.logits.data.fill_(50.0)
    batch = small_ioi().batch("train", 0, 4)
    clean = scored_logits(module.frozen, batch)
    lost, penalty = module.masked_loss(batch, clean)
    assert lost.abs().item() < 1e-5
    assert penalty.item() == pytest.approx(0.05 * len(module.level))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, accumulate):
    options = {"accumulate": accumulate, "target_size": 60, "target_warmup": 1, "node_penalty": 0.5}
    whole = train(tmp_path / "whole", 6, **options)
    train(tmp_path / "part", 3, **options)
    resumed = train(tmp_path / "rest", 6, tmp_path / "part" / "last.ckpt", **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    tables = [f"{kind}_{layer}" for layer in range(3) for kind in ("heads", "mlp")]
    constants = {f"replacements.constants.tables.{table}" for table in ("embedding_0", *tables)}
    assert set(whole.state_dict()) >= {"masks.distribution.logits", "penalty.log_weight"} | constants


def test_a_checkpoint_of_nodes_is_refused(tmp_path):
    train(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"level\.level: the checkpoint has edges, this configuration nodes"):
        CircuitModule().check_checkpoint(read_checkpoint(tmp_path / "last.ckpt"), None)


@pytest.mark.long
@pytest.mark.parametrize("target", [40, 100])
def test_the_circuit_comes_to_the_target_size(tmp_path, target):
    # What counts is what is left when dangling edges are gone.
    module = train(tmp_path, 500, target_size=target, target_warmup=200, penalty_weight=0.01, mask_learning_rate=0.1)
    assert abs(len(module.circuit()) - target) <= 0.1 * target


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"level": "nodes", "node_penalty": 0.5}, "node_penalty is 0.5, which is for edges"),
        ({"node_penalty": -1.0}, "node_penalty is -1.0"),
        ({"components": "m1->m0"}, "'m1->m0' matches no edge"),
        ({"components": ["*", "!*"]}, "selects nothing"),
        ({"target_size": 300}, "target_size is 300; expected more than 0 and at most 262"),
        ({"penalty_weight": []}, "lists of the same length"),
        ({"penalty_weight": [0.1, 0.2], "target_size": [10.0]}, "lists of the same length"),
        ({"penalty_weight": [0.1, -0.2]}, "penalty_weight is .*; expected a price"),
    ],
)
def test_what_cannot_work_is_refused(changes, said):
    with pytest.raises(ConfigurationError, match=said):
        CircuitModule(**EDGES | changes)


@pytest.mark.parametrize(
    ("level", "masks", "ablation"),
    [
        ("nodes", HardConcrete, "optimal"),
        ("nodes", UniformGradientSampling, "resample"),
        ("edges", UniformGradientSampling, "optimal"),
        pytest.param("edges", HardConcrete, "resample", marks=pytest.mark.long),
    ],
)
def test_circuits_side_by_side_have_the_gradients_that_they_have_alone(level, masks, ablation):
    """The masks of a circuit beside others come from other random numbers, so these are handed over."""
    options = {"level": level, "masks": masks, "samples_per_prompt": 2, "lm": LMSpec(dtype="float64")}
    options |= {"ablation": ablation}
    together = CircuitModule(penalty_weight=[0.02, 0.05, 0.01], **options)
    task = small_ioi(lm=together.lm)
    batch = task.batch("train", 0, 3)
    generator = torch.Generator().manual_seed(1)
    n = together.masks.n_selected
    together.masks.distribution.logits.data.normal_(0.5, 1.0, generator=generator)
    source = AblationSource(together.frozen, task, together.level)
    together.replacements.prepare(source)
    for table in tables_of(together).values():
        table.data.normal_(0.0, 0.3, generator=generator)
    clean = together.clean_logits(batch)
    lost, penalty = together.masked_loss(batch, clean)
    (lost + penalty).sum().backward()
    uniform = together.masks._uniform(batch.example_ids)
    for number, weight in enumerate([0.02, 0.05, 0.01]):
        alone = CircuitModule(penalty_weight=weight, **options)
        alone.masks.distribution.logits.data.copy_(together.masks.distribution.logits[number * n : (number + 1) * n])
        alone.masks._uniform = lambda _, part=uniform[:, number * n : (number + 1) * n]: part
        alone.replacements.prepare(source)
        if alone.replacements.constants is not None:
            alone.replacements.constants.load(together.replacements.constants.sets()[number])
        lost_alone, penalty_alone = alone.masked_loss(batch, clean)
        assert_close(lost[number], lost_alone[0], rtol=1e-5, atol=1e-7)
        assert_close(penalty[number], penalty_alone[0])
        (lost_alone + penalty_alone).sum().backward()
        assert_close(
            together.masks.distribution.logits.grad[number * n : (number + 1) * n],
            alone.masks.distribution.logits.grad,
            rtol=1e-4,
            atol=1e-7,
        )
        for name, table in tables_of(alone).items():
            assert_close(tables_of(together)[name].grad[number], table.grad[0], rtol=1e-4, atol=1e-7)


def tables_of(module: CircuitModule) -> Mapping[str, torch.Tensor]:
    return {} if module.replacements.constants is None else module.replacements.constants.tables


def test_circuits_side_by_side_are_trained_resumed_and_measured_each(tmp_path):
    options = {"penalty_weight": [0.01, 0.3], "mask_learning_rate": 0.2}
    whole = train(tmp_path / "whole", 12, **options)
    train(tmp_path / "part", 7, **options)
    resumed = train(tmp_path / "rest", 12, tmp_path / "part" / "last.ckpt", **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    first, second = (trained.circuit for trained in whole.trained_circuits())
    assert len(first) > len(second)
    assert first.provenance["training"]["penalty_weight"] == 0.01
    assert second.provenance["training"]["penalty_weight"] == 0.3
    trainer = quiet_trainer(max_steps=1)
    (figures,) = trainer.validate(whole, TaskData(small_ioi()), verbose=False)
    assert figures["val/size/0"] == len(first)
    assert figures["val/size/1"] == len(second)
    assert figures["val/kl"] == pytest.approx((figures["val/kl/0"] + figures["val/kl/1"]) / 2, rel=1e-5)
    priced = [figures[f"val/kl/{n}"] + weight * figures[f"val/size/{n}"] for n, weight in enumerate((0.01, 0.3))]
    assert figures["val/objective"] == pytest.approx(sum(priced) / 2, rel=1e-4)


def test_edges_are_refused_where_the_model_is_shared_out():
    trainer = quiet_trainer(max_steps=1, strategy=ShardedStrategy(), devices=1)
    try:
        with pytest.raises(ConfigurationError, match=r"fsdp .* gradients of edges need them again"):
            trainer.fit(CircuitModule(**EDGES), TaskData(small_ioi()))
    finally:
        torch.distributed.destroy_process_group()  # of this one process; other tests are not to find it


@pytest.mark.parametrize("masks", [UniformGradientSampling, partial(HardConcrete, initial_logit=0.0)])
def test_accumulated_batches_have_the_gradient_of_one_large_batch(masks):
    noted = []
    for accumulate, size in ((1, 4), (2, 2)):
        gradients = Gradients()
        module = CircuitModule(lm=LMSpec(dtype="float64"), masks=masks, **EDGES)
        trainer = quiet_trainer(max_steps=1, accumulate_grad_batches=accumulate, callbacks=[gradients])
        trainer.fit(module, TaskData(small_ioi(batch_size=size, batches_per_epoch=4)))
        noted.append(gradients.noted)
    for large, accumulated in zip(*noted, strict=True):
        assert large.abs().max() > 1e-6
        assert_close(accumulated, large, rtol=1e-4, atol=1e-7)


class Gradients(Callback):
    """Notes the gradients of the last step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.noted = [parameter.grad.clone() for parameter in pl_module.named_trainables().values()]


def test_a_target_counts_what_is_always_kept_whether_or_not_it_leads_somewhere(tmp_path):
    # Most of the 202 edges that are not selected lead nowhere once the others are cut; the weight stays finite.
    module = train(tmp_path, 12, components="a1.*", target_size=205, target_warmup=5, mask_learning_rate=0.5)
    assert torch.isfinite(module.penalty.weight).all()
    module.masks.distribution.logits.data.fill_(-5.0)
    kept = module.masks.discrete()
    assert int(kept.sum()) < module.masks.n_fixed
    assert not module.masks.priced(kept).any()
    with pytest.raises(ConfigurationError, match=r"A circuit of 20 parts .* 262, of which 202"):
        module.masks.check_size(20)


@pytest.mark.parametrize("level", ["nodes", "edges"])
def test_a_size_is_made_of_what_is_always_kept_first(level):
    module = CircuitModule(level=level, components="a1.*" if level == "nodes" else ["*", "!*->logits"])
    quiet_trainer(max_steps=1).fit(module, TaskData(small_ioi()))
    module.masks.distribution.logits.data.fill_(
        90.0
    )  # saturated: no selected part ranks below one that is always kept
    circuit = module.circuit(size=module.masks.n_fixed + 2)
    kept = circuit.mask & ~module.masks.selection
    if level == "nodes":
        assert torch.equal(kept, ~module.masks.selection)
    assert "edges_before_removal" not in circuit.provenance
