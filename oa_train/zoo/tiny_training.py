"""Training of the built-in model `tiny`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from oa_train.models.frozen import CausalLM
from oa_train.models.spec import LMSpec
from oa_train.seeds import python_generator
from oa_train.shapes import Bool, Float, Int, Tensor
from oa_train.tasks import GreaterThan, Task
from oa_train.tasks.ioi import Scene
from oa_train.zoo.tiny_prompts import RowInduction, SceneIOI, pair_held_out, template_held_out

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


def train(model: CausalLM, lm: LMSpec, recipe: Recipe, seed: int = 0) -> list[float]:
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
    model: CausalLM, tokens: Int[Tensor, "batch position"], mask: Bool[Tensor, "batch position"]
) -> Float[Tensor, ""]:
    """Half the loss of every next token, half that of the answer, which is the last token of its row.

    Without the second half the model spends its first thousand steps on words that nobody can foresee.
    """
    logits = model(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1]).logits
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    answer = losses[torch.arange(len(losses)), mask.sum(dim=1) - 2]
    return 0.5 * losses[mask[:, 1:]].mean() + 0.5 * answer.mean()


def _optimizer(model: CausalLM, recipe: Recipe) -> torch.optim.Optimizer:
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
