"""Makes the built-in model `tiny`: a GPT-2 small enough for any laptop that solves the built-in tasks.

    python -m oa_train.zoo.tiny --output checkpoints/tiny

Its vocabulary is the words of the task grammars and its training text is their prompts. Some pairs of names and
some templates never enter training; how well it does on them stands in the model card that is written beside it.
"""

import argparse
import hashlib
import logging
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Regex, pre_tokenizers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from oa_train.metrics.behaviour import is_correct
from oa_train.models.spec import LMSpec
from oa_train.seeds import derive_seed, python_generator
from oa_train.shapes import Bool, Float, Int, Tensor
from oa_train.tasks import IOI, GreaterThan, Induction, Prompt, Task
from oa_train.tasks.greater_than import CENTURIES, SENTENCE, YEARS
from oa_train.tasks.induction import OPENING
from oa_train.tasks.ioi import Scene
from oa_train.tasks.vocabulary import read_data, read_words
from oa_train.zoo.tokenizer import word_tokenizer

LISTS = ("names", "places", "objects", "nouns", "induction")

# Every word of these templates stands in another one too, so the model knows the words but not the sentence.
HELD_OUT_TEMPLATES: tuple[str, ...] = tuple(read_data("templates")["templates"][-3:])

EXAMPLE = "While Tom was busy, Anna and Paul met at the park. Paul handed the ring to"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Training of `tiny`.

    Attributes:
        steps: optimiser steps.
        ioi: prompts of indirect object identification in a step.
        greater_than: prompts of greater-than in a step.
        induction: prompts of induction in a step.
        unrelated: share of the indirect object prompts that name three people, each once. They teach the model
            that the answer is one of the two who are named together, whoever acts.
        learning_rate: highest learning rate. The model must notice that names come in pairs before it can find
            out which one to say; half this rate or twice the width stay on that plateau for long.
        final: share of the learning rate that is left at the last step.
        warmup: steps until the highest learning rate.
        weight_decay: decay of matrices; biases and norms have none.
        clip: largest norm of the gradient.
    """

    steps: int = 4000
    ioi: int = 42
    greater_than: int = 5
    induction: int = 17
    unrelated: float = 0.2
    learning_rate: float = 2e-3
    final: float = 0.05
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0


class SceneIOI(IOI):
    """Indirect object identification with a selection of scenes.

    Args:
        lm: the model whose tokenizer encodes the prompts.
        accept: whether a scene may be used.
        templates: the sentences to draw from; all by default.
        unrelated: share of prompts with three unrelated people; the answer is one of the first two, at random.
        seed: other seeds give other prompts.
    """

    def __init__(
        self,
        lm: LMSpec,
        accept: Callable[[Scene], bool],
        *,
        templates: tuple[str, ...] | None = None,
        unrelated: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(lm=lm, seed=seed)
        self.accept = accept
        self.templates = templates or self.templates
        self.unrelated = unrelated

    def draw(self, random: random.Random) -> Prompt:
        """Draw scenes until one is accepted."""
        scene = self.draw_scene(random)
        while not self.accept(scene):
            scene = self.draw_scene(random)
        if random.random() < self.unrelated:
            return Prompt(text=scene.unrelated_text, answers=(f" {random.choice(scene.unrelated[:2])}",))
        return replace(scene.prompt, spans={})  # unrelated people have no roles, and all prompts name the same spans


class RowInduction(Induction):
    """Rows of three words and more, of which a stretch comes back rather than one word.

    Short rows and long stretches give an induction head more to learn from; with single words in full rows
    alone it does not form in the time that the other tasks take.
    """

    def draw(self, random: random.Random) -> Prompt:
        """Draw a row, and how much of it comes back before the answer."""
        row = random.sample(self.words, random.randint(3, self.length))
        place = random.randrange(len(row) - 1)
        end = random.randint(place + 1, len(row) - 1)
        return Prompt(text=" ".join([OPENING, *row, *row[place:end]]), answers=(f" {row[end]}",))


def pair_held_out(scene: Scene) -> bool:
    """True for two people who never meet in training, in either role; a tenth of all pairs."""
    return derive_seed("pair", *sorted((scene.indirect_object, scene.subject))) % 10 == 0


def template_held_out(scene: Scene) -> bool:
    """True for a sentence that never enters training."""
    return scene.template in HELD_OUT_TEMPLATES


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


def train(model: GPT2LMHeadModel, lm: LMSpec, recipe: Recipe, seed: int = 0) -> list[float]:
    """Train the model on the task grammars.

    Args:
        model: changed in place.
        lm: a folder with the model's tokenizer.
        recipe: of the training.
        seed: seed of the prompts.

    Returns:
        The loss of each step.
    """
    tasks = _training_tasks(lm, recipe, seed)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    losses = []
    model.train()
    for step in range(recipe.steps):
        loss = _loss(model, *_training_batch(tasks, step, seed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 200 == 199:
            log.info("step %d of %d: loss %.4f", step + 1, recipe.steps, sum(losses[-200:]) / 200)
    model.eval()
    return losses


def _training_tasks(lm: LMSpec, recipe: Recipe, seed: int) -> list[tuple[Task, int]]:
    def accept(scene: Scene) -> bool:
        return not pair_held_out(scene) and not template_held_out(scene)

    return [
        (SceneIOI(lm, accept, unrelated=recipe.unrelated, seed=seed), recipe.ioi),
        (GreaterThan(lm=lm, seed=seed), recipe.greater_than),
        (RowInduction(lm=lm, seed=seed), recipe.induction),
    ]


def _training_batch(
    tasks: Sequence[tuple[Task, int]], step: int, seed: int
) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
    """Prompts with one right answer behind each, and a mask that is True at real tokens."""
    chance = python_generator(seed, "answers", step)
    texts = []
    for task, size in tasks:
        prompts = [task.prompt("train", step * size + number) for number in range(size)]
        texts += [prompt.text + chance.choice(prompt.answers) for prompt in prompts]
    encoder = tasks[0][0].encoder
    return encoder.pad(encoder.encode(texts), "right")


def _loss(
    model: GPT2LMHeadModel, tokens: Int[Tensor, "batch position"], mask: Bool[Tensor, "batch position"]
) -> Float[Tensor, ""]:
    """Half the loss of every next token, half that of the answer, which is the last token of its row.

    Without the second half the model spends its first thousand steps on words that nobody can foresee.
    """
    logits = model(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1]).logits
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    answer = losses[torch.arange(len(losses)), mask.sum(dim=1) - 2]
    return 0.5 * losses[mask[:, 1:]].mean() + 0.5 * answer.mean()


def _optimizer(model: GPT2LMHeadModel, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def _rate(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: a linear start, then a cosine."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = torch.tensor((step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    return recipe.final + (1 - recipe.final) * 0.5 * (1 + float(torch.cos(torch.pi * done)))


@torch.no_grad()
def accuracy(model: GPT2LMHeadModel, task: Task, n_prompts: int = 2000) -> float:
    """Share of a task's test prompts whose most probable next token, of all tokens, is an answer."""
    right = 0
    for batch in task.batches("test", n_prompts, 200):
        logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits
        scored = logits[torch.arange(len(batch)).unsqueeze(1), batch.scored]
        right += int(is_correct(scored, batch.answers).sum())
    return right / n_prompts


def held_out_figures(model: GPT2LMHeadModel, lm: LMSpec, n_prompts: int = 2000) -> dict[str, float]:
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
def next_words(model: GPT2LMHeadModel, task: Task, text: str, most: int = 2) -> list[tuple[str, float]]:
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
