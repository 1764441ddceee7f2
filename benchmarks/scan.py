"""Cost of a step of a scan relative to a full run of the model for every unit.

    python -m benchmarks.scan                     GPT-2-small shape, random weights, 156 heads and MLPs
    python -m benchmarks.scan --quick             a small shape, some seconds
    python -m benchmarks.scan --model DIRECTORY   your own model; `--model real` is that of `make real`

One prompt of 16 tokens, every head and MLP ablated alone. Contestants take turns in one process; seconds are CPU
seconds. Each line of the output is one JSON object.

    hf floor    plain Hugging Face forward and backward to a parameter added to the embedding, a row for each unit,
                with `logits_to_keep=1`
    floor       the same with a contiguous slice before the unembedding, which is faster on a CPU
    step        our training step of all units' constants: clean run, shared prefixes, backward
    hf forward  plain Hugging Face forward, a row for each unit, no gradient, with `logits_to_keep=1`
    forward     the same with a contiguous slice
    evaluation  our evaluation of all units, measures included
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.real_model import real_model
from benchmarks.timing import floor_step, kept_logits, plain_forward, random_tokens, side_by_side, summary
from oa_train import LMSpec, load_model
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import FittedCircuits
from oa_train.models.frozen import CausalLM, freeze
from oa_train.models.selection import Nodes

SHAPES = {
    "gpt2-small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "quick": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1000},
}


def model_of(options: argparse.Namespace) -> CausalLM:
    """The model that is timed."""
    if options.model:
        return load_model(LMSpec(str(real_model()) if options.model == "real" else options.model))
    torch.manual_seed(0)
    shape = SHAPES["quick" if options.quick else "gpt2-small"]
    return freeze(GPT2LMHeadModel(GPT2Config(**shape, n_positions=64)))


def contestants(model: CausalLM) -> dict[str, Callable[[], object]]:
    """Those of the description."""
    batch, level = random_tokens(1, 0), Nodes.of(model.config)
    masks = ~torch.eye(len(level), dtype=torch.bool)
    fitted = FittedCircuits(level, masks, [Constants.zeros(level)], "kl", rows_per_run=len(level))

    def step() -> None:
        for run in fitted.runs(model, batch):
            run.losses().sum().backward()
        fitted.zero_grad(set_to_none=True)

    return {
        "hf floor": floor_step(model, batch, kept_logits, len(level)),
        "floor": floor_step(model, batch, copies=len(level)),
        "step": step,
        "hf forward": plain_forward(model, batch.repeat(len(level)), kept_logits),
        "forward": plain_forward(model, batch.repeat(len(level))),
        "evaluation": lambda: circuit_behaviour(
            model, [batch], level, masks, fitted.constants.sets(), rows_per_run=len(level)
        ),
    }


def main() -> None:
    """Time them and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default=None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = model_of(options)
    about = {"python": platform.python_version(), "torch": torch.__version__, "arguments": sys.argv[1:]}
    print(json.dumps(about | {"units": len(Nodes.of(model.config))}), flush=True)
    times = side_by_side(contestants(model), options.repetitions, time.process_time)
    bases = {"step": ("hf floor", "floor"), "evaluation": ("hf forward", "forward")}
    for name, of_row in times.items():
        row: dict[str, object] = {"row": name} | summary(of_row)
        for base in bases.get(name, ()):
            ratios = [own / other for own, other in zip(of_row, times[base], strict=True)]
            row[f"of {base}"] = [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
