"""The memory estimate against the bytes that live in real training steps."""

from dataclasses import asdict

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.nodes import make_model
from benchmarks.scaling import Arrangement, estimated, measure
from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import unanswered
from oa_train.diagnostics.live_bytes import LiveBytes
from oa_train.diagnostics.memory import StepSettings, node_step_memory
from oa_train.engine.forward import scored_logits
from oa_train.engine.nodes import node_logits
from oa_train.errors import RunError
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.families import FAMILIES, Dimensions
from oa_train.models.loading import CausalLM, LMSpec, empty_model, freeze
from oa_train.models.selection import Components
from oa_train.training.circuit_module import CircuitModule
from tests.builders import TINY_CONFIGS, small_ioi


def built(family: str, dtype: torch.dtype, device: str) -> CausalLM:
    config = AutoConfig.for_model(family, vocab_size=301, pad_token_id=0, **TINY_CONFIGS[family])
    with torch.random.fork_rng(), torch.device(device):
        return freeze(AutoModelForCausalLM.from_config(config, dtype=dtype))


def measured_peak(model: CausalLM, n_prompts: int, n_tokens: int, n_samples: int) -> int:
    """Bytes at the peak of the second of two steps as `CircuitModule` takes them."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    sizes = Dimensions.of(model.config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 301, (n_prompts, n_tokens), generator=generator)
    batch = unanswered(tokens, torch.ones_like(tokens, dtype=torch.bool))
    with LiveBytes() as live:
        masks = UniformGradientSampling(len(Components.of(sizes)))
        constants = TrainableConstants([Constants.zeros(sizes)])
        optimiser = torch.optim.Adam([*masks.parameters(), *constants.parameters()])
        for _ in range(2):
            with torch.no_grad():
                clean = scored_logits(model, batch)
            rows = batch.repeat(n_samples)
            mask = masks.draw(len(rows), generator)
            logits = node_logits(model, rows, mask, constants.sets()[0].replacements(rows), None)
            loss = kl_divergence(torch.cat([clean] * n_samples), logits).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return weights + live.peak


# Prompts, tokens of each, samples for each prompt.
@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (2, 16, 4)), (torch.bfloat16, (8, 12, 1))])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_estimate_is_near_the_measured_peak(family, dtype, shape):
    estimate = node_step_memory(built(family, dtype, "meta"), StepSettings(*shape))
    assert estimate.total == pytest.approx(measured_peak(built(family, dtype, "cpu"), *shape), rel=0.15)


def test_the_estimate_is_near_a_step_of_the_training_module():
    lm = LMSpec("tiny")
    module = CircuitModule(lm=lm)
    batch = small_ioi(batch_size=16).batch("train", 0)
    weights = sum(tensor.nbytes for tensor in (*module.frozen.parameters(), *module.frozen.buffers()))
    with LiveBytes() as live:
        sum(module.masked_loss(batch, module.clean_logits(batch))).backward()
    estimate = node_step_memory(empty_model(lm), StepSettings(*batch.tokens.shape, module.samples_per_prompt))
    assert estimate.total == pytest.approx(weights + live.peak, rel=0.15)


WAYS = [
    Arrangement("alone", activation_checkpointing=True),
    Arrangement("mixed", dtype="float32", precision="bf16-mixed"),
    Arrangement("shared", processes=2, strategy="fsdp", dtype="bfloat16"),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_the_estimate_is_near_what_the_allocator_gives_to_a_trainer(tmp_path, way):
    make_model("quick", tmp_path / "model")
    found = measure(way, tmp_path, "cpu", n_timed=1)
    assert estimated(way, tmp_path) == pytest.approx(found["above_weights_bytes"], rel=0.15)


def test_processes_that_share_a_model_need_less_and_are_gone_afterwards():
    model = built("llama", torch.bfloat16, "meta")
    alone, *shared = (
        node_step_memory(model, StepSettings(4, 12, 2, strategy=strategy, n_processes=n))
        for strategy, n in (("auto", 1), ("fsdp", 2), ("fsdp", 8))
    )
    assert not torch.distributed.is_initialized()
    assert alone.gathered == 0
    for n, one in zip((2, 8), shared, strict=True):
        # Buffers are not shared out, and what does not divide is filled up.
        assert one.weights == pytest.approx(alone.weights / n, rel=0.1)
        # At least embedding and unembedding; blocks come and go.
        assert one.gathered >= 2 * 301 * 32 * 2 * (1 - 1 / n)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RunError, match="on its own"):
            node_step_memory(model, StepSettings(4, 12, 2, strategy="fsdp", n_processes=2))
    finally:
        torch.distributed.destroy_process_group()


def test_the_parts_are_what_they_say_and_grow_as_they_should():
    model = built("llama", torch.float32, "meta")
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    found, twice = (node_step_memory(model, StepSettings(n, 12, 2)) for n in (4, 8))
    assert found.weights == twice.weights
    assert found.weights >= sum(parameter.nbytes for parameter in model.parameters())
    sizes = Dimensions.of(model.config)
    n_constants = sizes.n_layers * (sizes.n_heads * sizes.d_head + sizes.d_model)
    # The constant of the embedding stands beside them, and is not trained.
    assert found.trained == twice.trained == 4 * (4 * (len(Components.of(sizes)) + n_constants) + sizes.d_model)
    assert twice.activations == pytest.approx(2 * found.activations, rel=0.02)
    assert twice.logits == pytest.approx(2 * found.logits, rel=0.02)
    assert found.total == sum(asdict(found).values())
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
