"""Shared by the timings: prompts of random tokens, costs of the plain model, round-robin timing of contestants."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from oa_train.batches import Batch
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.frozen import CausalLM

PROMPTS, SAMPLES, POSITIONS = 2, 4, 16
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    # Keeps freed blocks instead of handing them back to the system, as a GPU's caching allocator does.
    "nommap": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}


def random_tokens(size: int, seed: int) -> Batch:
    """Prompts of random tokens and fixed length, scored at their last position."""
    tokens = torch.randint(3, 500, (size, POSITIONS), generator=torch.Generator().manual_seed(seed))
    return Batch(
        tokens=tokens,
        attention_mask=torch.ones_like(tokens, dtype=torch.bool),
        scored=torch.full((size, 1), POSITIONS - 1),
        weights=torch.ones(size, 1),
        answers=torch.full((size, 1, 1), 5),
        distractors=torch.full((size, 1, 1), 6),
        counterfactual_tokens=None,
        example_ids=torch.arange(size),
        padded=False,
        protected=torch.zeros_like(tokens, dtype=torch.bool),
    )


def last_logits(model: CausalLM, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the plain model at the last position."""
    base: Any = model.base_model
    unembedding: Any = model.get_output_embeddings()
    logits: torch.Tensor = unembedding(base(**inputs, use_cache=False).last_hidden_state[:, -1].contiguous())
    return logits


def kept_logits(model: CausalLM, **inputs: torch.Tensor) -> torch.Tensor:
    """The same as Hugging Face offers it: on a CPU slower, because the slice that it unembeds is not contiguous."""
    call: Any = model
    logits: torch.Tensor = call(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits


def floor_step(
    model: CausalLM, batch: Batch, logits: Callable[..., torch.Tensor] = last_logits, copies: int = SAMPLES
) -> Callable[[], object]:
    """Forward and backward of the plain model on as many rows as the masked part has.

    Args:
        model: frozen.
        batch: of prompts.
        logits: of the model at the last position.
        copies: of each prompt.
    """
    rows = batch.repeat(copies)
    embedding: Any = model.get_input_embeddings()
    shift = torch.zeros(model.config.hidden_size, requires_grad=True)
    with torch.no_grad():
        clean = last_logits(model, input_ids=batch.tokens).repeat(copies, 1)

    def step() -> None:
        embedded = embedding(rows.tokens) + shift
        kl_divergence(clean, logits(model, inputs_embeds=embedded)).mean().backward()
        shift.grad = None

    return step


def plain_forward(
    model: CausalLM, batch: Batch, logits: Callable[..., torch.Tensor] = last_logits
) -> Callable[[], object]:
    """Forward of the plain model without gradients."""

    @torch.no_grad()
    def run() -> object:
        return logits(model, input_ids=batch.tokens)

    return run


def side_by_side(
    contestants: dict[str, Callable[[], object]],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every contestant in turn, again and again, after one round that does not count; in seconds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if repetition:
                times[name].append(clock() - start)
    return times


def summary(times: Sequence[float]) -> dict[str, object]:
    """Median and range of times in seconds."""
    return {
        "median_ms": round(1000 * statistics.median(times), 2),
        "range_ms": [round(1000 * min(times), 2), round(1000 * max(times), 2)],
        "repetitions": len(times),
    }


def under_both_allocators(module: str, arguments: Sequence[str]) -> None:
    """Run a benchmark with each allocator, in a process of its own."""
    words = [word for word in arguments if word != "--allocator"]
    for allocator, variables in ALLOCATORS.items():
        command = [sys.executable, "-m", module, *words, "--allocator", allocator]
        subprocess.run(command, check=True, env=os.environ | variables)  # noqa: S603 (our own command line)
