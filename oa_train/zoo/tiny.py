"""Makes the built-in model `tiny`: a GPT-2 small enough for any laptop that solves the built-in tasks.

    python -m oa_train.zoo.tiny --output checkpoints/tiny

Its vocabulary is the words of the task grammars, and its training text is their prompts. Some pairs of names and some
templates never enter training; the model card, written into the same folder, reports its accuracy on them.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from oa_train.models.frozen import CausalLM
from oa_train.models.spec import LMSpec
from oa_train.tasks import IOI, GreaterThan, Induction, Task
from oa_train.tasks.greater_than import CENTURIES, SENTENCE, YEARS
from oa_train.tasks.induction import OPENING
from oa_train.tasks.vocabulary import read_data, read_words
from oa_train.zoo.making import (
    make_from_command_line,
    next_words,
    one_thread,
    share_right,
    small_gpt2,
    temporary_lm,
    write_model,
)
from oa_train.zoo.tiny_prompts import HELD_OUT_TEMPLATES, SceneIOI, pair_held_out
from oa_train.zoo.tiny_training import Recipe, train
from oa_train.zoo.tokenizer import word_tokenizer

LISTS = ("names", "places", "objects", "nouns", "induction")

EXAMPLE = "While Tom was busy, Anna and Paul met at the park. Paul handed the ring to"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, with all words of the task grammars.

    A word includes the space before it, as in larger models. A year of four digits is two tokens.
    """
    digits = pre_tokenizers.Split(Regex(r"▁?\d\d"), "isolated")
    split = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), digits])
    pieces = {piece for text in _grammar_texts() for piece, _ in split.pre_tokenize_str(text)}
    # Years are added in the form in which they follow their century, without the mark of a space.
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
    """Make the model with random weights."""
    return small_gpt2("tiny", seed, tokenizer, n_positions=48, n_layer=3, n_inner=128)


def held_out_figures(model: CausalLM, lm: LMSpec, n_prompts: int = 2000) -> dict[str, float]:
    """Accuracy on each kind of prompt that the model was not trained on; `lm` is a folder with its tokenizer."""
    tasks: dict[str, Task] = {
        "indirect object, pairs of names that were held out": SceneIOI(lm, pair_held_out),
        "indirect object, templates that were held out": SceneIOI(lm, lambda _: True, templates=HELD_OUT_TEMPLATES),
        "indirect object, both held out": SceneIOI(lm, pair_held_out, templates=HELD_OUT_TEMPLATES),
        "greater-than": GreaterThan(lm=lm),
        "induction": Induction(lm=lm),
    }
    return {
        kind: share_right(model, task, [task.prompt("test", number) for number in range(n_prompts)])
        for kind, task in tasks.items()
    }


def build(output: Path, seed: int = 0, recipe: Recipe | None = None, n_prompts: int = 2000) -> dict[str, float]:
    """Make the model, write its folder by `write_model`, and return the accuracies of `held_out_figures`."""
    recipe = recipe or Recipe()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    with temporary_lm(tokenizer, model) as lm:
        with one_thread():
            train(model, lm, recipe, seed)
        figures = held_out_figures(model, lm, n_prompts)
        example = next_words(model, IOI(lm=lm), EXAMPLE)

    def card(digest: str) -> str:
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

    write_model(output, model, tokenizer, card)
    return figures


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


main = partial(make_from_command_line, "tiny", __doc__, build)


if __name__ == "__main__":
    main()
