"""Cost of a training step of the OCA lens at all layers at once, relative to a tapped run of the model for each layer.

    python -m benchmarks.lenses                     GPT-2-small shape, random weights
    python -m benchmarks.lenses --quick             a small shape, some seconds
    python -m benchmarks.lenses --model DIRECTORY   your own model; `--model real` is that of `make real`

Prompts of 16 tokens. Contestants take turns in one process; seconds are CPU seconds. Each line of the output is one
JSON object.

    tapped, last    our engine for nodes: a row for each layer and prompt, attention replaced by constants from that
                    layer on, forward and backward, scored at the last position
    tapped, all     the same, scored at every position
    lens, last      a step of LensModule's `oca` at all layers, clean run included, scored at the last position
    lens, all       the same, scored at every position: as many tokens as the tapped run has
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.scan import model_of
from benchmarks.timing import random_tokens, side_by_side, summary
from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import Batch
from oa_train.engine.levels import masked_logits
from oa_train.engine.values import side_by_side as values_side_by_side
from oa_train.lenses.lens import ConstantsLens
from oa_train.lenses.predictions import Tokens, lens_logits
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.frozen import CausalLM
from oa_train.models.parts import Dimensions
from oa_train.models.selection import Nodes
from oa_train.training.side_by_side import summed


def scored_everywhere(batch: Batch) -> Batch:
    """The prompts, scored at every position."""
    rows, width = batch.tokens.shape
    return replace(
        batch,
        scored=torch.arange(width).expand(rows, -1),
        weights=torch.full((rows, width), 1 / width),
        answers=batch.answers.expand(-1, width, -1),
        distractors=batch.distractors.expand(-1, width, -1),
    )


def tapped_step(model: CausalLM, batch: Batch) -> Callable[[], object]:
    """A step of constants in place of attention from each layer on, a full row of the model for each layer."""
    level, n_layers = Nodes.of(model.config, ["attention"]), Dimensions.of(model.config).n_layers
    masks = torch.ones(n_layers, n_layers).tril(-1).repeat_interleave(len(batch), dim=0)
    trained = TrainableConstants([Constants.zeros(level)] * n_layers)
    rows = batch.repeat(n_layers)

    def step() -> None:
        with torch.no_grad():
            kept, unused = torch.ones(len(batch), n_layers), trained.sets()[0].at(batch.positions)
            clean = masked_logits(model, batch, level, kept, unused)
        values = values_side_by_side([own.at(batch.positions) for own in trained.sets()], len(batch))
        logits = masked_logits(model, rows, level, masks, values)
        kl_divergence(clean.repeat(n_layers, 1, 1), logits).mean().backward()
        trained.zero_grad(set_to_none=True)

    return step


def lens_step(model: CausalLM, batch: Batch) -> Callable[[], object]:
    """A step of the lens as LensModule makes it."""
    sizes = Dimensions.of(model.config)
    lens = ConstantsLens(range(sizes.n_layers), sizes.n_layers, sizes.d_model)

    def step() -> None:
        tokens = Tokens(model, batch)

        def lost(piece: slice) -> torch.Tensor:
            return kl_divergence(tokens.logits[piece], lens_logits(lens, model, tokens, piece)).sum(dim=1)

        parts = [partial(lost, piece) for piece in tokens.pieces(sizes.n_layers)]
        summed(parts, list(lens.parameters()))[1].backward()
        lens.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Time them and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default=None)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = model_of(options)
    last = random_tokens(options.prompts, 0)
    everywhere = scored_everywhere(last)
    about = {"python": platform.python_version(), "torch": torch.__version__, "arguments": sys.argv[1:]}
    print(json.dumps(about | {"layers": Dimensions.of(model.config).n_layers}), flush=True)
    contestants = {
        "tapped, last": tapped_step(model, last),
        "tapped, all": tapped_step(model, everywhere),
        "lens, last": lens_step(model, last),
        "lens, all": lens_step(model, everywhere),
    }
    times = side_by_side(contestants, options.repetitions, time.process_time)
    for name, of_row in times.items():
        row: dict[str, object] = {"row": name} | summary(of_row)
        if name.startswith("lens"):
            base = times[name.replace("lens", "tapped")]
            ratios = [own / other for own, other in zip(of_row, base, strict=True)]
            row["of tapped"] = [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
