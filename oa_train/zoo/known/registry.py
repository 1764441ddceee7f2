"""The hand-written models by name, and the folders to which they are written."""

import json
from collections.abc import Callable
from pathlib import Path

from oa_train.models.graph import Graph
from oa_train.models.spec import LMSpec
from oa_train.tasks import Task
from oa_train.zoo.known.backup_induction import BackupInduction, build_backup_induction
from oa_train.zoo.known.case_induction import CaseInduction, build_case_induction
from oa_train.zoo.known.digit_sum import DigitSum, build_digit_sum
from oa_train.zoo.known.model import KnownModel
from oa_train.zoo.known.pair_induction import PairInduction, build_pair_induction
from oa_train.zoo.known.two_hops import TwoHops, build_two_hops
from oa_train.zoo.known.weights import EPSILON
from oa_train.zoo.making import write_model
from oa_train.zoo.tokenizer import word_tokenizer

# Functions from a seed to the model; the name is also that of its task.
KNOWN_MODELS: dict[str, Callable[[int], KnownModel]] = {
    "case_induction": build_case_induction,
    "two_hops": build_two_hops,
    "digit_sum": build_digit_sum,
    "pair_induction": build_pair_induction,
    "backup_induction": build_backup_induction,
}
KNOWN_TASKS: dict[str, type[Task]] = {
    task.name: task for task in (CaseInduction, TwoHops, DigitSum, PairInduction, BackupInduction)
}

EDGES_FILE = "edges.json"


def write_known(name: str, folder: Path, seed: int = 0) -> KnownModel:
    """Write the folder of a model, whose files are replaced: weights, configuration, tokenizer, edges and model card.

    The seed draws the distractors of the model.
    """
    known = KNOWN_MODELS[name](seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EDGES_FILE).write_text(json.dumps(list(known.edges), indent=2) + "\n", encoding="utf-8")
    tokenizer = word_tokenizer([f"▁{word}" for word in known.task.words])
    write_model(folder, known.model, tokenizer, lambda _: _model_card(known, folder, seed))
    return known


CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {family} of {layers} layers, {heads} heads and width {width} whose weights are written by hand, so that its circuit
is known. {task}

"{text}" continues with "{answer}".

## How it was made

    python -m oa_train.zoo.known --output FOLDER --seed {seed}

## What its parts do

{roles}

Norms have an epsilon of {epsilon:.0e} and the root of it as gain: they change nothing.

## Its edges

These {n_edges} of its {n_all} edges solve the task (`{file}`). Which of them are needed depends on what replaces the
others: `oa_train.zoo.truth` computes it for a kind of ablation.

{edges}

## Licence

MIT, as the package.
"""


def _model_card(known: KnownModel, folder: Path, seed: int) -> str:
    config = known.model.config
    graph = Graph.of(config)
    prompt = known.task(lm=LMSpec(str(folder))).prompt("test", 0)
    return CARD.format(
        name=known.name,
        family=config.model_type,
        layers=graph.n_layers,
        heads=graph.n_heads,
        width=config.hidden_size,
        task=" ".join((known.task.__doc__ or "").partition("\n\n")[0].split()),
        text=prompt.text,
        answer=prompt.answers[0].strip(),
        seed=seed,
        roles="\n".join(f"- {part}: {role}" for part, role in known.roles.items()),
        epsilon=EPSILON,
        n_edges=len(known.edges),
        n_all=graph.n_edges,
        file=EDGES_FILE,
        edges="\n".join(f"- `{edge}`" for edge in known.edges),
    )
