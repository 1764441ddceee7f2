"""Makes the built-in model `tiny`: a GPT-2 small enough for any laptop that solves the built-in tasks.

    python -m oa_train.zoo.tiny --output checkpoints/tiny

Its vocabulary is the words of the task grammars and its training text is their prompts. Some pairs of names and
some templates never enter training; how well it does on them stands in the model card that is written beside it.
"""

import argparse
import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from oa_train.metrics.behaviour import is_correct
from oa_train.models.frozen import CausalLM
from oa_train.models.spec import LMSpec
from oa_train.seeds import derive_seed
from oa_train.tasks import IOI, GreaterThan, Induction, Task
from oa_train.tasks.greater_than import CENTURIES, SENTENCE, YEARS
from oa_train.tasks.induction import OPENING
from oa_train.tasks.vocabulary import read_data, read_words
from oa_train.zoo.tiny_prompts import HELD_OUT_TEMPLATES, SceneIOI, pair_held_out
from oa_train.zoo.tiny_training import Recipe, train
from oa_train.zoo.tokenizer import word_tokenizer

LISTS = ("names", "places", "objects", "nouns", "induction")

EXAMPLE = "While Tom was busy, Anna and Paul met at the park. Paul handed the ring to"

log = logging.getLogger(__name__)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words that knows what the task grammars say.

    A word carries the space before it, as in larger models. A year of four digits is two tokens.
    """
    digits = pre_tokenizers.Split(Regex(r"▁?\d\d"), "isolated")
    split = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), digits])
    pieces = {piece for text in _grammar_texts() for piece, _ in split.pre_tokenize_str(text)}
    # Years are added as they stand after their century, without the mark of a space.
    return word_tokenizer(sorted(pieces | set(YEARS)), split)


def _grammar_texts() -> Iterator[str]:
    for name in LISTS:
        yield from read_words(name)
    for sentences in read_data("templates").values():
        yield from (re.sub(r"\{\w+\}", "", sentence) for sentence in sentences)
    yield re.sub(r"\{\w+\}", "", SENTENCE)
    yield from CENTURIES
    yield OPENING


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> GPT2LMHeadModel:
    """Make the model with random weights; the global generator is not touched."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=48,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_inner=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("tiny", seed))
        return GPT2LMHeadModel(config)


@torch.no_grad()
def accuracy(model: CausalLM, task: Task, n_prompts: int = 2000) -> float:
    """Share of a task's test prompts whose most probable next token, of all tokens, is an answer."""
    right = 0
    for batch in task.batches("test", n_prompts, 200):
        logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits
        scored = logits[torch.arange(len(batch)).unsqueeze(1), batch.scored]
        right += int(is_correct(scored, batch.answers).sum())
    return right / n_prompts


def held_out_figures(model: CausalLM, lm: LMSpec, n_prompts: int = 2000) -> dict[str, float]:
    """Accuracy on each kind of prompt that the model was not trained on.

    Args:
        model: the trained model.
        lm: a folder with its tokenizer.
        n_prompts: test prompts of each kind.
    """
    tasks: dict[str, Task] = {
        "indirect object, pairs of names that were held out": SceneIOI(lm, pair_held_out),
        "indirect object, templates that were held out": SceneIOI(lm, lambda _: True, templates=HELD_OUT_TEMPLATES),
        "indirect object, both held out": SceneIOI(lm, pair_held_out, templates=HELD_OUT_TEMPLATES),
        "greater-than": GreaterThan(lm=lm),
        "induction": Induction(lm=lm),
    }
    return {kind: accuracy(model, task, n_prompts) for kind, task in tasks.items()}


@torch.no_grad()
def next_words(model: CausalLM, task: Task, text: str, most: int = 2) -> list[tuple[str, float]]:
    """The most probable next words of a text, with their probabilities."""
    tokens, mask = task.encoder.pad(task.encoder.encode([text]), "right")
    top = model(input_ids=tokens, attention_mask=mask).logits[0, -1].softmax(dim=-1).topk(most)
    words = task.tokenizer.convert_ids_to_tokens(top.indices.tolist())
    return [(word.replace("▁", " "), value) for word, value in zip(words, top.values.tolist(), strict=True)]


def build(output: Path, seed: int = 0, recipe: Recipe | None = None, n_prompts: int = 2000) -> dict[str, float]:
    """Make the model and write its folder: weights, configuration, tokenizer and model card.

    Args:
        output: the folder; files in it are replaced.
        seed: seed of weights and prompts.
        recipe: of the training; by default that of the built-in model.
        n_prompts: test prompts of each kind.

    Returns:
        The accuracies of `held_out_figures`.
    """
    recipe = recipe or Recipe()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    with tempfile.TemporaryDirectory() as folder:
        # The tasks ask for the tokenizer of a model in a folder, so there must be one before training.
        lm = LMSpec(folder)
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        with one_thread():
            train(model, lm, recipe, seed)
        figures = held_out_figures(model, lm, n_prompts)
        example = next_words(model, IOI(lm=lm), EXAMPLE)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    card = _model_card(figures, example, seed, recipe, n_prompts, digest)
    (output / "README.md").write_text(card, encoding="utf-8")
    for file in output.iterdir():
        file.chmod(0o644)  # transformers leaves the weights readable by their owner only
    return figures


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: sums are then taken in one order, and so small a model is no slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


CARD = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny

A GPT-2 of 3 layers, 4 heads and width 64 that solves the built-in tasks of `oa_train`: indirect object
identification, greater-than and induction. It serves demonstrations and tests of circuit discovery, and knows no
English beyond the sentences of these tasks.

## How it was made

    python -m oa_train.zoo.tiny --output checkpoints/tiny --seed {seed}

{steps} steps of {batch} prompts ({ioi} indirect object, {greater_than} greater-than, {induction} induction), drawn
from the grammars in `oa_train/tasks` and nothing else, on one CPU thread (under three minutes). Its tokens are the
grammars' words. A tenth of all pairs of names, and three sentence templates, never entered training.

Of the indirect object prompts {unrelated} % name three people, each once, and half have a clause with a further name
("While Tom was busy,"). Without such clauses a model learns to say the name that occurs once, and needs no circuit.

## How well it does

Share of {n_prompts:,} test prompts whose most probable next token, of all tokens, is right:

| prompts | accuracy |
|---|---|
{rows}

"{text}" continues with {example}.

SHA-256 of `model.safetensors`: `{digest}`

## Licence

MIT, as the package. The training text was generated; no one else's text or weights went into it.
"""


def _model_card(
    figures: dict[str, float],
    example: Sequence[tuple[str, float]],
    seed: int,
    recipe: Recipe,
    n_prompts: int,
    digest: str,
) -> str:
    return CARD.format(
        seed=seed,
        steps=f"{recipe.steps:,}",
        batch=recipe.ioi + recipe.greater_than + recipe.induction,
        ioi=recipe.ioi,
        greater_than=recipe.greater_than,
        induction=recipe.induction,
        unrelated=f"{100 * recipe.unrelated:.0f}",
        rows="\n".join(f"| {kind} | {100 * share:.2f} % |" for kind, share in figures.items()),
        n_prompts=n_prompts,
        text=EXAMPLE,
        example=", ".join(f'"{word}" ({value:.4f})' for word, value in example),
        digest=digest,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the built-in model from the command line."""
    parser = argparse.ArgumentParser(prog="python -m oa_train.zoo.tiny", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder that is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and prompts")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for kind, share in build(options.output, options.seed).items():
        log.info("%s: %.4f", kind, share)


if __name__ == "__main__":
    main()
