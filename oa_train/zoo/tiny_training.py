"""Training of the built-in model `tiny`."""

from collections.abc import Sequence
from dataclasses import dataclass

from oa_train.models.frozen import CausalLM
from oa_train.models.spec import LMSpec
from oa_train.seeds import python_generator
from oa_train.shapes import Bool, Int, Tensor
from oa_train.tasks import GreaterThan, Task
from oa_train.tasks.ioi import Scene
from oa_train.zoo.tiny_prompts import RowInduction, SceneIOI, pair_held_out, template_held_out
from oa_train.zoo.training import Schedule, answer_loss, train_on


@dataclass(frozen=True)
class Recipe(Schedule):
    """Training settings of `tiny`.

    The model must learn that names come in pairs before it can learn which one to say; with half the learning rate or
    twice the width it stays on that plateau for long.

    Attributes:
        ioi: number of prompts of indirect object identification in a step.
        greater_than: number of prompts of greater-than in a step.
        induction: number of prompts of induction in a step.
        unrelated: share of the indirect object prompts that name three people, each once. They teach the model
            that the answer is one of the two who are named together, whoever acts.
    """

    ioi: int = 42
    greater_than: int = 5
    induction: int = 17
    unrelated: float = 0.2


def train(model: CausalLM, lm: LMSpec, recipe: Recipe, seed: int = 0) -> list[float]:
    """Train the model in place on the task grammars; returns the loss of each step.

    `lm` is a folder with the model's tokenizer, and the seed decides the prompts.
    """
    tasks = _training_tasks(lm, recipe, seed)
    return train_on(model, lambda step: answer_loss(model, *_training_batch(tasks, step, seed)), recipe)


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
    """Prompts, each followed by one right answer, and a mask that is True at real tokens."""
    chance = python_generator(seed, "answers", step)
    texts = []
    for task, size in tasks:
        prompts = [task.prompt("train", step * size + number) for number in range(size)]
        texts += [prompt.text + chance.choice(prompt.answers) for prompt in prompts]
    encoder = tasks[0][0].encoder
    return encoder.pad(encoder.encode(texts), "right")
