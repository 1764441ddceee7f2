"""Cost of edge-level training relative to the plain model.

    python -m benchmarks.edges            three families at the size of GPT-2 small, random weights
    python -m benchmarks.edges --quick    the same at a small size, under a minute
    python -m benchmarks.edges --growth   a small width with more and more layers and heads

Everything is timed side by side in one process of one thread, as in `benchmarks.nodes`. Each line of the output is one
JSON object; memory is the peak of all tensors other than the weights, in a step from a fresh start.

    floor_hf         plain Hugging Face forward and backward to a parameter added to the embedding, on all rows, with
                     `logits_to_keep=1`
    clean_hf         the same call on the prompts alone, no gradient
    forward_hf       the same on all rows, no gradient
    floor, clean, forward
                     the same three with a contiguous slice before the unembedding, as our own steps have it, which is
                     faster on a CPU; ratios to these are called strict
    node             whole step with UGS masks over heads and MLPs
    ugs              whole step with UGS masks over edges: clean forward, masks without dangling edges, forward, KL
                     divergence and size, backward, Adam for masks and constants
    hard_concrete    the same with hard concrete masks
    recompute        as `ugs`; the inputs of readers are recomputed in the backward pass
    evaluation       forward on all rows with masks over edges
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.timing import (
    ALLOCATORS,
    PROMPTS,
    SAMPLES,
    floor_step,
    kept_logits,
    last_logits,
    plain_forward,
    random_tokens,
    side_by_side,
    summary,
    under_both_allocators,
)
from oa_train.ablations.constants import Constants
from oa_train.batches import Batch
from oa_train.cli.quiet import silence_libraries
from oa_train.diagnostics.live_bytes import LiveBytes
from oa_train.engine.edges.workspace import free_workspace
from oa_train.engine.levels import masked_logits
from oa_train.masks.base import MaskDistribution, averaged_gradient
from oa_train.masks.hard_concrete import HardConcrete
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.frozen import CausalLM, freeze
from oa_train.models.graph import Graph
from oa_train.models.levels import Level
from oa_train.models.selection import Nodes

SIZE_WEIGHT = 1e-4


def shapes(n_layers: int, n_heads: int, d_model: int, vocabulary: int) -> dict[str, dict[str, Any]]:
    """Configurations of about one size: GPT-2, Pythia with its parallel residual stream, Llama with grouped keys."""
    common = {"num_hidden_layers": n_layers, "num_attention_heads": n_heads, "hidden_size": d_model}
    common |= {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 64}
    return {
        "gpt2": {"model_type": "gpt2", **common},
        "pythia": {"model_type": "gpt_neox", **common, "intermediate_size": 4 * d_model},
        "llama": {
            "model_type": "llama",
            **common,
            "intermediate_size": 8 * d_model // 3,
            "num_key_value_heads": max(n_heads // 4, 1),
        },
    }


def make_model(config: dict[str, Any]) -> CausalLM:
    """A frozen model with random weights."""
    torch.manual_seed(0)
    settings = {name: value for name, value in config.items() if name != "model_type"}
    model: CausalLM = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    freeze(model)
    return model


def trained_constants(level: Level) -> Constants:
    """Constants for all units of a level, with gradients."""
    return Constants.zeros(level).mapped(lambda table: table.requires_grad_())


def draw(distribution: MaskDistribution, level: Level, rows: int) -> torch.Tensor:
    """Masks, with 0 for entries that have no effect beside the others."""
    mask = distribution.sample(torch.rand(rows, len(distribution.logits)))
    if not level.has_one_stream:
        mask = mask * level.prune(mask.detach() > 0)
    inside = distribution.carries_gradient(mask)
    return mask if inside is None else averaged_gradient(mask, inside.sum(dim=0), rows)


def whole_step(
    model: CausalLM, batch: Batch, distribution: MaskDistribution, level: Level, recompute: bool = False
) -> Callable[[], object]:
    """A training step of masks and constants.

    Args:
        model: frozen.
        batch: of prompts.
        distribution: over masks.
        level: what the masks are over.
        recompute: see `masked_logits`.
    """
    constants, rows = trained_constants(level), batch.repeat(SAMPLES)
    optimizer = torch.optim.Adam([*distribution.parameters(), *constants.tables.values()])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            clean = last_logits(model, input_ids=batch.tokens).repeat(SAMPLES, 1)
        mask = draw(distribution, level, len(rows))
        logits = masked_logits(model, rows, level, mask, constants.replacements(rows), recompute)
        loss = kl_divergence(clean, logits[:, 0]).mean() + SIZE_WEIGHT * distribution.keep_probability().sum()
        loss.backward()
        optimizer.step()

    return step


def evaluation(model: CausalLM, batch: Batch, graph: Graph) -> Callable[[], object]:
    """Forward under discrete masks over edges."""
    rows = batch.repeat(SAMPLES)
    values = Constants.zeros(graph).replacements(rows)
    mask = (torch.rand(len(rows), len(graph)) > 0.5).float()

    @torch.no_grad()
    def run() -> object:
        return masked_logits(model, rows, graph, mask, values)

    return run


def contestants(model: CausalLM) -> dict[str, Callable[[], object]]:
    """All that are timed, by name."""
    batch, graph, nodes = random_tokens(PROMPTS, 0), Graph.of(model.config), Nodes.of(model.config)
    rows = batch.repeat(SAMPLES)
    over_nodes, over_edges = UniformGradientSampling(len(nodes)), UniformGradientSampling(len(graph))

    return {
        "floor_hf": floor_step(model, batch, kept_logits),
        "clean_hf": plain_forward(model, batch, kept_logits),
        "forward_hf": plain_forward(model, rows, kept_logits),
        "floor": floor_step(model, batch),
        "clean": plain_forward(model, batch),
        "forward": plain_forward(model, rows),
        "node": whole_step(model, batch, over_nodes, nodes),
        "ugs": whole_step(model, batch, over_edges, graph),
        "hard_concrete": whole_step(model, batch, HardConcrete(len(graph)), graph),
        "recompute": whole_step(model, batch, UniformGradientSampling(len(graph)), graph, recompute=True),
        "evaluation": evaluation(model, batch, graph),
    }


def peak_bytes(model: CausalLM, run: Callable[[], object]) -> int:
    """Most that one call takes; optimisers have their state already."""
    run()
    free_workspace(model)
    with LiveBytes() as live:
        run()
    free_workspace(model)
    return int(live.peak)


def measure(config: dict[str, Any], repetitions: int) -> Iterator[dict[str, object]]:
    """One row for each contestant, of one model."""
    model = make_model(config)
    runs = contestants(model)
    memory = {name: peak_bytes(model, run) for name, run in runs.items()}
    times = side_by_side(runs, repetitions)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name in runs:
        yield {
            "name": name,
            **ratios(median, name),
            "peak_bytes": memory[name],
            "memory_ratio_to_floor": round(memory[name] / memory["floor"], 3),
            **summary(times[name]),
        }


def ratios(median: dict[str, float], name: str) -> dict[str, float]:
    """Cost of one contestant relative to the plain model, with Hugging Face's unembedding and with ours."""
    bases = {
        "ratio_to_floor_plus_clean": median["floor_hf"] + median["clean_hf"],
        "strict_ratio_to_floor_plus_clean": median["floor"] + median["clean"],
        "ratio_to_forward": median["forward_hf"],
        "strict_ratio_to_forward": median["forward"],
    }
    return {ratio: round(median[name] / base, 3) for ratio, base in bases.items()}


def grown() -> dict[str, dict[str, Any]]:
    """GPT-2 at a small width with more and more layers, and with more and more heads."""
    layers = {f"{n} layers, 4 heads": shapes(n, 4, 128, 1000)["gpt2"] for n in (2, 4, 8, 16)}
    heads = {f"4 layers, {n} heads": shapes(4, n, 128, 1000)["gpt2"] for n in (2, 8, 16)}
    return layers | heads


def main() -> None:
    """Measure under both allocators, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small size")
    parser.add_argument("--growth", action="store_true", help="ratios against numbers of layers and heads")
    parser.add_argument("--shape", choices=[*shapes(1, 1, 1, 1)], help="only this family")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--allocator", choices=[*ALLOCATORS, "both"], default="both", help="of the C library")
    options = parser.parse_args()
    if options.allocator == "both":
        under_both_allocators("benchmarks.edges", sys.argv[1:])
        return
    silence_libraries()
    torch.set_num_threads(1)
    about = {"allocator": options.allocator, "torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    every = grown() if options.growth else shapes(*((4, 4, 128, 1000) if options.quick else (12, 12, 768, 50257)))
    for shape, config in every.items():
        if options.shape in (None, shape):
            for row in measure(config, options.repetitions):
                print(json.dumps(row | {"shape": shape} | about), flush=True)


if __name__ == "__main__":
    main()
