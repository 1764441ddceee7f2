"""Small real models and batches for the tests: random weights, true configurations, no download."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from oa_train.ablations.constants import Constants
from oa_train.batches import Batch
from oa_train.engine.values import Values
from oa_train.masks.base import MaskDistribution, averaged_gradient
from oa_train.models.dictionaries import Dictionary
from oa_train.models.frozen import CausalLM, freeze
from oa_train.models.levels import Level
from oa_train.models.spec import LMSpec, builtin_models
from oa_train.tasks import IOI
from oa_train.tasks.vocabulary import read_data, read_words

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
    "gpt2": {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_inner": 48, "n_positions": 24, "resid_pdrop": 0.1},
    "gpt_neox": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
    },
    "gpt_neo": {
        "num_layers": 3,
        "num_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 4,
    },
    "gptj": {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 24, "rotary_dim": 4},
    "opt": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "max_position_embeddings": 24,
    },
    "phi": GROUPED,
    "llama": WIDE,
    "mistral": WIDE | {"sliding_window": 4},
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "phi3": GROUPED,
    "smollm3": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "gemma": WIDE,
    "gemma2": WIDE | {"query_pre_attn_scalar": 12, "sliding_window": 4},
    "gemma3_text": WIDE | {"query_pre_attn_scalar": 12, "sliding_window": 4},
    "olmo3": GROUPED | {"sliding_window": 4},
    "granite": GROUPED | {"residual_multiplier": 0.3, "embedding_multiplier": 2.0},
    "stablelm": GROUPED,
    "bloom": {"n_layer": 3, "n_head": 4, "hidden_size": 32},
    "falcon": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "parallel_attn": False,
        "alibi": True,
    },
    "mixtral": WIDE | {"num_local_experts": 3, "sliding_window": None},
    "qwen3_moe": WIDE | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmoe": GROUPED | {"num_experts": 3, "num_experts_per_tok": 2},
    "gpt_oss": WIDE
    | {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "default"},
    },
}

# Of these families transformers loads every tokenizer as byte-level BPE, whatever class was saved.
BYTE_LEVEL = {"qwen2"}
# Left out of the text that tokenizers are trained on, so that the byte-level tokenizer splits them.
RARE = {"Anthony", "museum", "necklace", "rebellion", "velvet"}


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
    firsts = [n if left else 0 for n in pads]
    protected = [[i == first and row[0] == BOS for i in range(width)] for first, row in zip(firsts, rows, strict=True)]
    return Batch(
        tokens=torch.tensor(tokens),
        attention_mask=torch.tensor(mask).bool(),
        scored=torch.tensor(scored).unsqueeze(1),
        weights=torch.ones(len(rows), 1),
        answers=torch.full((len(rows), 1, 1), 5),
        distractors=torch.full((len(rows), 1, 1), 6),
        counterfactual_tokens=None,
        example_ids=torch.arange(len(rows)),
        padded=any(pads),
        protected=torch.tensor(protected),
    )


def widened(batch: Batch, side: str, further: int) -> Batch:
    """The batch with further columns of padding."""
    pads = (further, 0) if side == "left" else (0, further)
    others = batch.counterfactual_tokens
    return replace(
        batch,
        tokens=torch.nn.functional.pad(batch.tokens, pads, value=PAD),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, pads, value=False),
        protected=torch.nn.functional.pad(batch.protected, pads, value=False),
        spans={name: torch.nn.functional.pad(span, pads, value=False) for name, span in batch.spans.items()},
        scored=batch.scored + pads[0],
        counterfactual_tokens=None if others is None else torch.nn.functional.pad(others, pads, value=PAD),
        padded=True,
    )


def random_constants(level: Level, positions: int = 1, seed: int = 0, requires_grad: bool = False) -> Constants:
    """Random float64 constants for a level."""
    generator = torch.Generator().manual_seed(seed)
    zeros = Constants.zeros(level, positions)
    return zeros.mapped(
        lambda table: torch.randn(table.shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)
    )


def random_values(level: Level, rows: int, columns: int, seed: int = 0) -> Values:
    """Random values that differ in every row and column, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    return Values(
        {
            site: torch.randn(rows, columns, *shape, generator=generator, dtype=torch.float64).requires_grad_()
            for site, shape in level.sites.items()
        }
    )


def random_mask(rows: int, entries: int, seed: int = 0) -> torch.Tensor:
    """Float64 masks of which about a quarter each is exactly 0 and exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, entries, generator=generator, dtype=torch.float64) * 2 - 0.5).clamp(0, 1)


def draw_masks(masks: MaskDistribution, n_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Masks whose gradients are averaged over these rows."""
    mask = masks.sample(torch.rand(n_rows, len(masks.logits), generator=generator, dtype=masks.logits.dtype))
    inside = masks.carries_gradient(mask)
    return mask if inside is None else averaged_gradient(mask, inside.sum(dim=0), n_rows)


def random_dictionary(site: str, n_features: int = 10, seed: int = 0, d_model: int = 32) -> Dictionary:
    """A dictionary whose reconstructions are far from what it reads."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Dictionary(
        site, drawn(d_model, n_features), drawn(n_features), drawn(n_features, d_model), drawn(d_model), "relu"
    )


def with_spans(batch: Batch, **spans: Iterable[int]) -> Batch:
    """The batch with spans of the real tokens at some positions of every row."""
    at = {name: torch.isin(batch.positions, torch.tensor(list(positions))) for name, positions in spans.items()}
    return replace(batch, spans={name: inside & batch.attention_mask for name, inside in at.items()})


def traces(model: CausalLM) -> list[Any]:
    """All that an intervention could leave behind in a model; versions count changes of weights in place."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [list(getattr(module, kind)) for module in model.modules() for kind in kinds],
        [sorted({"forward", "generate", "_compiled_call_impl"} & vars(module).keys()) for module in model.modules()],
        [(name, id(weight), weight._version, weight.grad is None) for name, weight in model.named_parameters()],
        [weight.requires_grad for weight in model.parameters()],
    ]


def training_text() -> Iterator[str]:
    """What the tasks are made of, for training tokenizers."""
    for name in ("names", "places", "objects", "nouns", "induction"):
        yield from (f"Then {word}, {word}." for word in read_words(name) if word not in RARE for _ in range(20))
    for sentences in read_data("templates").values():
        yield from sentences * 20
    yield from [f"Then {century}" for century in range(10, 19)] * 200
    yield from [f"{year:02d}" for year in range(100) if year != 55] * 100
    yield from ["The lasted from the year to the year", "Words: a"] * 20


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's, in which most words of the tasks are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def save_language_model(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changed_sizes: int) -> LMSpec:
    """A tiny random model of a family in a folder, with a tokenizer that knows the tasks and its vocabulary."""
    tokenizer: PreTrainedTokenizerBase = (
        byte_level_tokenizer() if family in BYTE_LEVEL else AutoTokenizer.from_pretrained(builtin_models()["tiny"])
    )
    sizes = {name: 64 if "position" in name else size for name, size in TINY_CONFIGS[family].items()} | changed_sizes
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
