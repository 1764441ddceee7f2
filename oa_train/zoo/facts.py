"""Makes the built-in model `facts`: a small GPT-2 that knows the facts of the task `SyntheticFacts`.

    python -m oa_train.zoo.facts --output checkpoints/facts

It is trained so that a person's facts are found at the last token of the person's name: in half the prompts of a
step, the output of a middle block at that token is exchanged between people, and the answer is the object of the
person whose values were inserted (interchange intervention training, Geiger et al., 2022, arXiv:2112.00826).
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from oa_train.models.frozen import CausalLM
from oa_train.models.hooks import Tap, tapped
from oa_train.seeds import derive_seed, torch_generator
from oa_train.shapes import Bool, Float, Int, Tensor
from oa_train.tasks import Prompt, SyntheticFacts
from oa_train.tasks.vocabulary import read_data
from oa_train.zoo.making import (
    make_from_command_line,
    next_words,
    one_thread,
    share_right,
    small_gpt2,
    temporary_lm,
    write_model,
)
from oa_train.zoo.tokenizer import word_tokenizer
from oa_train.zoo.training import Schedule, answer_loss, train_on

EXAMPLE = "Most people say that Kestra Lumo now earns a living as a"

N_LAYERS = 5


@dataclass(frozen=True)
class Recipe(Schedule):
    """Training settings of `facts`.

    Attributes:
        batch_size: number of prompts in a step.
        exchanged: share of the prompts in a step whose people are exchanged in the middle of the model.
        layers: blocks after which they are exchanged; the steps take them in turn.
    """

    steps: int = 4000
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    batch_size: int = 64
    exchanged: float = 0.5
    layers: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class FactPrompts:
    """Prompts of the task as tensors.

    Attributes:
        tokens: token ids of each prompt, followed by its answer.
        mask: True at real tokens.
        subject: column of the last token of the subject.
        relation: index of the relation.
        objects: token of the object of the prompt's subject under each relation.
    """

    tokens: Int[Tensor, "prompt position"]
    mask: Bool[Tensor, "prompt position"]
    subject: Int[Tensor, " prompt"]
    relation: Int[Tensor, " prompt"]
    objects: Int[Tensor, "prompt relation"]

    @classmethod
    def of(cls, task: SyntheticFacts, prompts: Sequence[Prompt]) -> "FactPrompts":
        """Encode prompts of the task."""
        encoder, facts = task.encoder, task.facts()
        answers = [prompt.answers[0] for prompt in prompts]
        rows = encoder.encode([prompt.text + answer for prompt, answer in zip(prompts, answers, strict=True)])
        tokens, mask = encoder.pad(rows, "right")
        flags = encoder.span_flags([prompt.text for prompt in prompts], [prompt.spans for prompt in prompts])
        known = [facts[subject_of(prompt)] for prompt in prompts]
        ids = [[encoder.continuation("", f" {names[0]}") for names in objects.values()] for objects in known]
        places = [
            [f" {names[0]}" for names in objects.values()].index(answer)
            for objects, answer in zip(known, answers, strict=True)
        ]
        last = [max(place for place, inside in enumerate(row["subject"]) if inside) for row in flags]
        return cls(tokens, mask, torch.tensor(last), torch.tensor(places), torch.tensor(ids))


def subject_of(prompt: Prompt) -> str:
    """The person whom a prompt asks about."""
    start, end = (int(place) for place in prompt.spans["subject"])
    return prompt.text[start:end]


def held_out(prompt: Prompt) -> bool:
    """True for a tenth of the prompts, which never enter training; another sentence may tell the same fact."""
    return derive_seed("held out", prompt.text) % 10 == 0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, with all words of the task."""
    data = read_data("synthetic_facts")
    texts = list(data["names"])
    for content in data["relations"].values():
        texts += content["objects"] + [re.sub(r" ?\{\w+\}", "", sentence) for sentence in content["templates"]]
    return word_tokenizer(sorted({f"▁{word}" for text in texts for word in text.split()}))


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> GPT2LMHeadModel:
    """Make the model with random weights."""
    return small_gpt2("facts", seed, tokenizer, n_positions=32, n_layer=N_LAYERS, n_inner=256)


def all_prompts(task: SyntheticFacts) -> list[Prompt]:
    """The prompts of all streams."""
    return list({prompt.text: prompt for stream in task.streams.values() for prompt in stream}.values())


def train(model: CausalLM, task: SyntheticFacts, recipe: Recipe, seed: int = 0) -> list[float]:
    """Train the model in place on the facts, in an order that the seed decides; returns the loss of each step."""
    facts = FactPrompts.of(task, [prompt for prompt in all_prompts(task) if not held_out(prompt)])
    return train_on(model, lambda step: _step_loss(model, facts, recipe, seed, step), recipe)


def _step_loss(model: CausalLM, facts: FactPrompts, recipe: Recipe, seed: int, step: int) -> Float[Tensor, ""]:
    generator = torch_generator("facts", seed, step)
    chosen = torch.randint(len(facts.tokens), (recipe.batch_size,), generator=generator)
    mask = facts.mask[chosen]
    width = int(mask.sum(dim=1).max())
    tokens, mask = facts.tokens[chosen, :width], mask[:, :width]
    donors = torch.arange(len(chosen))
    n_exchanged = round(recipe.exchanged * len(chosen))
    donors[:n_exchanged] = donors[:n_exchanged].roll(1)
    rows = torch.arange(len(chosen))
    tokens[rows, mask.sum(dim=1) - 1] = facts.objects[chosen[donors], facts.relation[chosen]]
    with exchanged(model, recipe.layers[step % len(recipe.layers)], facts.subject[chosen], donors):
        return answer_loss(model, tokens, mask)


def exchanged(
    model: CausalLM, layer: int, columns: Int[Tensor, " batch"], donors: Int[Tensor, " batch"]
) -> AbstractContextManager[None]:
    """Exchange the output of a block at one token of each prompt between the prompts of a batch.

    Args:
        model: the model, a GPT-2.
        layer: index of the block.
        columns: column of the token in each prompt.
        donors: index of the prompt from which each one gets its values; its own index leaves it unchanged.
    """
    rows = torch.arange(len(columns))

    def exchange(hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        changed[rows, columns] = hidden[donors, columns[donors]]
        return changed

    return tapped([Tap(model.get_submodule(f"transformer.h.{layer}"), "output", exchange)])


def figures(model: CausalLM, task: SyntheticFacts) -> dict[str, float]:
    """Share of the facts that the model knows: by prompts that it was trained on, and by those that were held out."""
    prompts = all_prompts(task)
    kinds = {
        "sentences that it was trained on": [prompt for prompt in prompts if not held_out(prompt)],
        "sentences that were held out": [prompt for prompt in prompts if held_out(prompt)],
    }
    return {kind: share_right(model, task, chosen) for kind, chosen in kinds.items()}


def build(output: Path, seed: int = 0, recipe: Recipe | None = None) -> Mapping[str, float]:
    """Make the model, write its folder by `write_model`, and return the shares of `figures`."""
    recipe = recipe or Recipe()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    with temporary_lm(tokenizer, model) as lm:
        task = SyntheticFacts(lm=lm)
    with one_thread():
        train(model, task, recipe, seed)
    shares = figures(model, task)
    example = next_words(model, task, EXAMPLE)

    def card(digest: str) -> str:
        return CARD.format(
            n_layers=N_LAYERS,
            n_people=len(task.facts()),
            n_prompts=len(all_prompts(task)),
            seed=seed,
            steps=f"{recipe.steps:,}",
            batch=recipe.batch_size,
            exchanged=f"{100 * recipe.exchanged:.0f}",
            layers=" or ".join(map(str, recipe.layers)),
            last=max(recipe.layers),
            rows="\n".join(f"| {kind} | {100 * share:.2f} % |" for kind, share in shares.items()),
            text=EXAMPLE,
            example=", ".join(f'"{word}" ({value:.4f})' for word, value in example),
            digest=digest,
        )

    write_model(output, model, tokenizer, card)
    return shares


CARD = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# facts

A GPT-2 of {n_layers} layers, 4 heads and width 64 that knows the town, the job and the instrument of {n_people}
invented people: the task `SyntheticFacts` of `oa_train`. It serves demonstrations and tests of causal tracing, and
knows no English beyond the sentences of this task.

## How it was made

    python -m oa_train.zoo.facts --output checkpoints/facts --seed {seed}

{steps} steps of {batch} prompts, drawn from the {n_prompts:,} of the task in all its streams and nothing else, on
one CPU thread (under four minutes). Its tokens are the words of the task. A tenth of the prompts never entered
training; the other sentence of their relation tells the same fact, if it was not held out too.

In {exchanged} % of the prompts, what block {layers} writes at the last token of the person's name was exchanged with
another prompt's, and the answer was the object of the person whose values came in (interchange intervention training,
Geiger et al., 2022, arXiv:2112.00826). So it is known where this model finds its facts: up to block {last}, everything
that it knows of a person stands at the last token of the name. A model trained on the sentences alone fetches both
names to the end of the prompt in its first blocks, and finds the object there.

## How well it does

Share of prompts whose most probable next token, of all tokens, is right:

| prompts | accuracy |
|---|---|
{rows}

"{text}" continues with {example}.

SHA-256 of `model.safetensors`: `{digest}`

## Licence

MIT, as the package. The training text was generated; no one else's text or weights went into it.
"""


main = partial(make_from_command_line, "facts", __doc__, build)


if __name__ == "__main__":
    main()
