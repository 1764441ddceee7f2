"""Writes the models whose circuits are known, each into a folder with its tokenizer, its edges and a model card.

    python -m oa_train.zoo.write_known --output checkpoints/known

Nothing is trained: the weights are written by hand (`oa_train.zoo.known`), and so are made in seconds.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from oa_train.models.graph import Graph
from oa_train.models.loading import LMSpec
from oa_train.tasks import CaseInduction, DigitSum, PairInduction, Task, TwoHops
from oa_train.tasks.encoding import word_tokenizer
from oa_train.zoo.known import KNOWN_MODELS
from oa_train.zoo.known.model import KnownModel
from oa_train.zoo.known.vocabulary import BOS, PAD, UNKNOWN
from oa_train.zoo.known.weights import EPSILON

# The task that each model solves, under the name of both.
KNOWN_TASKS: dict[str, type[Task]] = {task.name: task for task in (CaseInduction, TwoHops, DigitSum, PairInduction)}

EDGES_FILE = "edges.json"

log = logging.getLogger(__name__)


def write_known(name: str, folder: Path, seed: int = 0) -> KnownModel:
    """Write the folder of one model: weights, configuration, tokenizer, edges and model card.

    Args:
        name: of the model, one of `KNOWN_MODELS`.
        folder: files in it are replaced.
        seed: draws the parts of the model that have no share in the task.
    """
    known = KNOWN_MODELS[name](seed)
    folder.mkdir(parents=True, exist_ok=True)
    word_tokenizer(known.words, BOS, PAD, UNKNOWN).save_pretrained(folder)
    known.model.save_pretrained(folder)
    (folder / EDGES_FILE).write_text(json.dumps(list(known.edges), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(known, folder, seed), encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # transformers leaves the weights readable by their owner only
    return known


CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {family} of {layers} layers, {heads} heads and width {width} whose weights were written by hand, so that its circuit
is known. {task}

"{text}" continues with "{answer}".

## How it was made

    python -m oa_train.zoo.write_known --output FOLDER --seed {seed}

## What its parts do

{wiring}

Norms have an epsilon of {epsilon:.0e} and the root of it as gain: they change nothing.

## Its edges

By these {n_edges} of its {n_all} edges it solves the task (`{file}`). Which of them can be spared depends on what
stands in for the others: `oa_train.zoo.truth` computes it for a kind of ablation.

{edges}

## Licence

MIT, as the package.
"""


def model_card(known: KnownModel, folder: Path, seed: int) -> str:
    """Write the model card.

    Args:
        known: the model.
        folder: with its tokenizer and configuration.
        seed: it was made with.
    """
    config = known.model.config
    graph = Graph.of(config)
    task = KNOWN_TASKS[known.name](lm=LMSpec(str(folder)))
    prompt = task.prompt("test", 0)
    return CARD.format(
        name=known.name,
        family=config.model_type,
        layers=graph.n_layers,
        heads=graph.n_heads,
        width=config.hidden_size,
        task=" ".join((type(task).__doc__ or "").partition("\n\n")[0].split()),
        text=prompt.text,
        answer=prompt.answers[0].strip(),
        seed=seed,
        wiring="\n".join(f"- {part}: {does}" for part, does in known.wiring.items()),
        epsilon=EPSILON,
        n_edges=len(known.edges),
        n_all=graph.n_edges,
        file=EDGES_FILE,
        edges="\n".join(f"- `{edge}`" for edge in known.edges),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all models from the command line."""
    parser = argparse.ArgumentParser(prog="python -m oa_train.zoo.write_known", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder in which each model gets one of its own")
    parser.add_argument("--seed", type=int, default=0, help="seed of the parts that have no share in the task")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in KNOWN_MODELS:
        known = write_known(name, options.output / name, options.seed)
        log.info("%s: %d edges", options.output / name, len(known.edges))


if __name__ == "__main__":
    main()
