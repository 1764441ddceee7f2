"""The memory estimate against the bytes that live in real training steps."""

from dataclasses import asdict

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.nodes import make_model
from benchmarks.scaling import Arrangement, estimated, measure
from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import unanswered
from oa_train.cli.main import main
from oa_train.diagnostics.live_bytes import LiveBytes
from oa_train.diagnostics.memory import StepSettings, node_step_memory
from oa_train.diagnostics.model_facts import model_facts
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.errors import RunError
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.families import FAMILIES
from oa_train.models.frozen import CausalLM, freeze
from oa_train.models.loading import empty_model
from oa_train.models.parts import Dimensions
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from oa_train.training.circuit_module import CircuitModule
from tests.builders import TINY_CONFIGS, draw_masks, small_ioi
from tests.conftest import ARCHETYPES


def built(family: str, dtype: torch.dtype, device: str) -> CausalLM:
    config = AutoConfig.for_model(family, vocab_size=301, pad_token_id=0, **TINY_CONFIGS[family])
    with torch.random.fork_rng(), torch.device(device):
        return freeze(AutoModelForCausalLM.from_config(config, dtype=dtype))


def measured_peak(model: CausalLM, n_prompts: int, n_tokens: int, n_samples: int) -> int:
    """Bytes at the peak of the second of two steps as `CircuitModule` takes them."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    level = Nodes.of(model.config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 301, (n_prompts, n_tokens), generator=generator)
    batch = unanswered(tokens, torch.ones_like(tokens, dtype=torch.bool))
    with LiveBytes() as live:
        masks = UniformGradientSampling(len(level))
        constants = TrainableConstants([Constants.zeros(level)])
        optimiser = torch.optim.Adam([*masks.parameters(), *constants.parameters()])
        for _ in range(2):
            with torch.no_grad():
                clean = scored_logits(model, batch)
            rows = batch.repeat(n_samples)
            mask = draw_masks(masks, len(rows), generator)
            logits = masked_logits(model, rows, level, mask, constants.sets()[0].replacements(rows))
            loss = kl_divergence(torch.cat([clean] * n_samples), logits).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return weights + live.peak


def assert_estimate(family: str, dtype: torch.dtype, n_prompts: int, n_tokens: int, n_samples: int) -> None:
    estimate = node_step_memory(built(family, dtype, "meta"), StepSettings(n_prompts, n_tokens, n_samples))
    peak = measured_peak(built(family, dtype, "cpu"), n_prompts, n_tokens, n_samples)
    assert estimate.total == pytest.approx(peak, rel=0.15)


WITH_EXPERTS = ("gpt_oss", "mixtral", "olmoe", "qwen3_moe")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WITH_EXPERTS)))
def test_the_estimate_is_near_the_measured_peak(family):
    assert_estimate(family, torch.float32, 2, 16, 4)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_memory_of_experts_is_not_estimated_and_everything_else_is_told(family, tmp_path, capsys):
    AutoConfig.for_model(family, vocab_size=301, **TINY_CONFIGS[family]).save_pretrained(tmp_path)
    assert model_facts(LMSpec(str(tmp_path)), StepSettings(2, 4, 1))["step_bytes"] is None
    assert main(["inspect", "--lm.name", str(tmp_path)]) == 0
    assert "not estimated: the memory of experts" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("family", ARCHETYPES)
def test_the_estimate_is_near_the_measured_peak_in_half_precision(family):
    assert_estimate(family, torch.bfloat16, 8, 12, 1)


def test_the_estimate_is_near_a_step_of_the_training_module():
    lm = LMSpec("tiny")
    module = CircuitModule(lm=lm)
    batch = small_ioi(batch_size=16).batch("train", 0)
    weights = sum(tensor.nbytes for tensor in (*module.frozen.parameters(), *module.frozen.buffers()))
    with LiveBytes() as live:
        sum(module.masked_loss(batch, module.clean_logits(batch))).backward()
    estimate = node_step_memory(empty_model(lm), StepSettings(*batch.tokens.shape, module.masks.samples_per_prompt))
    assert estimate.total == pytest.approx(weights + live.peak, rel=0.15)


WAYS = [
    Arrangement("alone", recompute=True),
    pytest.param(Arrangement("mixed", dtype="float32", precision="bf16-mixed"), marks=pytest.mark.long),
    pytest.param(Arrangement("shared", processes=2, strategy="fsdp", dtype="bfloat16"), marks=pytest.mark.long),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_the_estimate_is_near_what_the_allocator_gives_to_a_trainer(tmp_path, way):
    make_model("quick", tmp_path / "model")
    measured = measure(way, tmp_path, "cpu", n_timed=1)
    assert estimated(way, tmp_path) == pytest.approx(measured["above_weights_bytes"], rel=0.15)


def test_processes_that_share_a_model_need_less_and_are_gone_afterwards():
    model = built("llama", torch.bfloat16, "meta")
    alone, *shared = (
        node_step_memory(model, StepSettings(4, 12, 2, strategy=strategy, n_processes=n))
        for strategy, n in (("auto", 1), ("fsdp", 2), ("fsdp", 8))
    )
    assert not torch.distributed.is_initialized()
    assert alone.gathered == 0
    for n, part in zip((2, 8), shared, strict=True):
        # Buffers are not shared out, and what does not divide is filled up.
        assert part.weights == pytest.approx(alone.weights / n, rel=0.1)
        # At least embedding and unembedding; blocks come and go.
        assert part.gathered >= 2 * 301 * 32 * 2 * (1 - 1 / n)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RunError, match="inside a process group"):
            node_step_memory(model, StepSettings(4, 12, 2, strategy="fsdp", n_processes=2))
    finally:
        torch.distributed.destroy_process_group()


def test_the_parts_are_what_they_say_and_grow_as_they_should():
    model = built("llama", torch.float32, "meta")
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    once, twice = (node_step_memory(model, StepSettings(n, 12, 2)) for n in (4, 8))
    assert once.weights == twice.weights
    assert once.weights >= sum(parameter.nbytes for parameter in model.parameters())
    sizes = Dimensions.of(model.config)
    n_constants = sizes.n_layers * (sizes.n_heads * sizes.d_head + sizes.d_model)
    # Parameters, gradients and two moments, of four bytes each.
    assert once.trained == twice.trained == 4 * 4 * (len(Nodes.of(model.config)) + n_constants)
    assert twice.activations == pytest.approx(2 * once.activations, rel=0.02)
    assert twice.logits == pytest.approx(2 * once.logits, rel=0.02)
    assert once.total == sum(asdict(once).values())
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert all(parameter.is_meta for parameter in model.parameters())


def test_live_bytes_counts_each_storage_once_and_forgets_what_is_gone():
    older = torch.zeros(100)
    with LiveBytes() as live:
        older.add_(1)
        view = older[:10]
        assert live.now == 0
        made = torch.ones(50) + 1
        reshaped = made.view(5, 10)
        assert (live.now, live.peak) == (200, 400)
        del made
        assert live.now == 200
        del reshaped
        assert (live.now, live.peak) == (0, 400)
    assert view.sum() == 10
