"""Small real models and batches for the tests: random weights, true configurations, no download."""

from pathlib import Path
from typing import Any

import lightning
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from oa_train.ablations.base import Replacements
from oa_train.ablations.constants import Constants
from oa_train.batches import Batch
from oa_train.models.families import Dimensions
from oa_train.models.loading import CausalLM, LMSpec, builtin_models, freeze
from oa_train.tasks import IOI

BOS, PAD = 1, 0
VOCABULARY = 37

# What makes a configuration of each family tiny; everything else is the family's default. Heads are wider than
# width / heads and share keys and values where the family allows it, so that mistaking one for the other shows.
GROUPED = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
WIDE = GROUPED | {"head_dim": 12}
TINY_CONFIGS = {
    "gpt2": {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 24, "resid_pdrop": 0.1},
    "gpt_neox": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
    },
    "llama": WIDE,
    "mistral": WIDE | {"sliding_window": 4},
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "phi3": GROUPED,
    "smollm3": GROUPED,
    "olmo2": GROUPED,
    "gemma3_text": WIDE | {"query_pre_attn_scalar": 12, "sliding_window": 4},
}


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> CausalLM:
    """A random model of a family; weights are spread widely so that no component is without effect."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=BOS, eos_token_id=2, pad_token_id=PAD, **TINY_CONFIGS[family]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name or ("ln_" in name and name.endswith("weight")) else 0.0
            torch.nn.init.normal_(parameter, mean=centre, std=0.25)
    return freeze(model)


def random_batch(lengths: list[int], padding_side: str = "right", seed: int = 0, width: int | None = None) -> Batch:
    """Rows of random tokens after a BOS, scored at their last real token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[BOS, *torch.randint(3, VOCABULARY, (n - 1,), generator=generator).tolist()] for n in lengths]
    return batch_of(rows, padding_side, width)


def batch_of(rows: list[list[int]], padding_side: str = "right", width: int | None = None) -> Batch:
    """Pad token lists to a batch."""
    width = width or max(map(len, rows))
    left = padding_side == "left"
    pads = [width - len(row) for row in rows]
    tokens = [[PAD] * n + row if left else row + [PAD] * n for row, n in zip(rows, pads, strict=True)]
    mask = [[0] * n + [1] * len(r) if left else [1] * len(r) + [0] * n for r, n in zip(rows, pads, strict=True)]
    scored = [width - 1 if left else len(row) - 1 for row in rows]
    return Batch(
        tokens=torch.tensor(tokens),
        attention_mask=torch.tensor(mask).bool(),
        scored=torch.tensor(scored),
        answers=torch.full((len(rows), 1), 5),
        distractors=torch.full((len(rows), 1), 6),
        counterfactual_tokens=None,
        example_ids=torch.arange(len(rows)),
        padded=any(pads),
    )


def random_constants(model: CausalLM, n_positions: int = 1, seed: int = 0, requires_grad: bool = False) -> Constants:
    """Random float64 constants for a model."""
    sizes = Dimensions.of(model.config)
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(
        sizes.n_layers, n_positions, sizes.n_heads, sizes.d_head, generator=generator, dtype=torch.float64
    )
    mlps = torch.randn(sizes.n_layers, n_positions, sizes.d_model, generator=generator, dtype=torch.float64)
    return Constants(heads.requires_grad_(requires_grad), mlps.requires_grad_(requires_grad), BOS)


def random_replacements(model: CausalLM, rows: int, positions: int, seed: int = 0) -> Replacements:
    """Random replacements that differ in every row and position, with gradients."""
    sizes = Dimensions.of(model.config)
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.n_layers, rows, positions)
    heads = torch.randn(*shape, sizes.n_heads, sizes.d_head, generator=generator, dtype=torch.float64)
    mlps = torch.randn(*shape, sizes.d_model, generator=generator, dtype=torch.float64)
    return Replacements(heads.requires_grad_(), mlps.requires_grad_())


def random_mask(rows: int, entries: int, seed: int = 0) -> torch.Tensor:
    """Float64 masks of which about a quarter each is exactly 0 and exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, entries, generator=generator, dtype=torch.float64) * 2 - 0.5).clamp(0, 1)


def save_language_model(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> LMSpec:
    """A tiny random model of a family in a folder, with the built-in model's tokenizer and its vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_models()["tiny"])
    sizes = {name: 64 if "positions" in name else size for name, size in TINY_CONFIGS[family].items()}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LMSpec(str(folder))


def small_ioi(**changes: Any) -> IOI:
    """The built-in model's task with few prompts."""
    return IOI(
        **({"batch_size": 4, "batches_per_epoch": 5, "n_validation": 16, "n_test": 32, "n_means": 32} | changes)
    )


def quiet_trainer(**changes: Any) -> lightning.Trainer:
    """A trainer that logs nothing and shows nothing."""
    silent = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
    }
    return lightning.Trainer(**(silent | changes))
