"""Prompts on which the built-in model `tiny` is trained, and the rules for those that are held out."""

import random
from collections.abc import Callable
from dataclasses import replace

from oa_train.models.spec import LMSpec
from oa_train.seeds import derive_seed
from oa_train.tasks import IOI, Induction, Prompt
from oa_train.tasks.induction import OPENING
from oa_train.tasks.ioi import Scene
from oa_train.tasks.vocabulary import read_data

# Every word of these templates also occurs in another one, so the model knows the words but not the sentence.
HELD_OUT_TEMPLATES: tuple[str, ...] = tuple(read_data("templates")["templates"][-3:])


class SceneIOI(IOI):
    """Indirect object identification with a selection of scenes.

    Args:
        lm: the model whose tokenizer encodes the prompts.
        accept: tells whether a scene may be used.
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
    """Rows of three or more words, of which a stretch is repeated rather than a single word.

    Short rows and long stretches give an induction head more to learn from; with only single words in full rows it
    does not form in the time that the other tasks take.
    """

    def draw(self, random: random.Random) -> Prompt:
        """Draw a row, and how much of it is repeated before the answer."""
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
