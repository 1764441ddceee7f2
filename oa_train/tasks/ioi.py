"""Indirect object identification: "Then, Anna and Paul met at the park. Paul handed the ring to" -> " Anna"."""

import random
from dataclasses import dataclass
from typing import Any, Literal, get_args

from oa_train.checks import check_choice
from oa_train.errors import ConfigurationError
from oa_train.seeds import derive_seed
from oa_train.tasks.grammar import GrammarTask, end_span, fill
from oa_train.tasks.task import Prompt
from oa_train.tasks.vocabulary import read_data, single_token_words

Order = Literal["mixed", "ABBA", "BABA"]
Sentences = Literal["varied", "literature"]

# A prompt and its counterfactual name six people: two in the prompt, three in the counterfactual, and a bystander.
MINIMUM_NAMES = 6
MINIMUM_OTHERS = 2


@dataclass(frozen=True)
class Scene:
    """Contents of a prompt: the sentence and the people in it.

    Attributes:
        template: the template that the frame was made from.
        frame: the template with everything filled in except the three mentions {A}, {B} and {S}.
        indirect_object: name of the receiver; the answer.
        subject: name of the giver, which occurs twice.
        unrelated: three other people, for a text in which nobody is named twice.
        subject_first: True if the subject is named before the indirect object (BABA), False if after (ABBA).
    """

    template: str
    frame: str
    indirect_object: str
    subject: str
    unrelated: tuple[str, str, str]
    subject_first: bool

    @property
    def prompt(self) -> Prompt:
        """The prompt, whose counterfactual names the three unrelated people."""
        indirect_object, subject = "BA" if self.subject_first else "AB"
        people = {indirect_object: self.indirect_object, subject: self.subject}
        text, places = fill(self.frame, **people, S=self.subject)
        return Prompt(
            text=text,
            answers=(f" {self.indirect_object}",),
            distractors=(f" {self.subject}",),
            counterfactual=self.unrelated_text,
            spans={"IO": places[indirect_object], "S1": places[subject], "S2": places["S"], "end": end_span(text)},
        )

    @property
    def unrelated_text(self) -> str:
        """The sentence with three unrelated people, which has no answer."""
        first, second, third = self.unrelated
        return self.frame.format(A=first, B=second, S=third)


class IOI(GrammarTask):
    """Indirect object identification: one of two people is named again and gives something to the other.

    The counterfactual names three other people in the same sentence. Spans: `IO` (the indirect object), `S1` and `S2`
    (first and second mention of the subject), `end` (the last token).

    Args:
        order: ABBA introduces the indirect object first, BABA the subject; mixed draws one of the two for each prompt.
        sentences: `literature` are the fifteen templates of Wang et al. (2023), which pretrained models know well;
            `varied` are templates with varied openings, made for training a small model.
        distractor_names: probability that a clause with a third name is added ("While Tom was busy,"); by default 0.5
            for `varied` and 0 for `literature`, which has no such clauses. Without them a small model learns to look
            for the name that occurs once.
        **options: the options of every task (see `Task`).

    Attributes:
        names: first names that are single tokens.
        places: places that are single tokens.
        objects: things to give that are single tokens.
        templates: sentences with slots.
    """

    name = "ioi"

    def __init__(
        self,
        *,
        order: Order = "mixed",
        sentences: Sentences = "varied",
        distractor_names: float | None = None,
        **options: Any,
    ) -> None:
        check_choice("sentences", sentences, get_args(Sentences))
        if distractor_names is None:
            distractor_names = 0.5 if sentences == "varied" else 0
        if distractor_names and sentences == "literature":
            raise ConfigurationError(
                f"distractor_names is {distractor_names}, but the sentences of the literature name two people only. "
                "Leave it out, or choose sentences: varied."
            )
        if not 0 <= distractor_names <= 1:
            raise ConfigurationError(f"distractor_names is {distractor_names}; expected a probability from 0 to 1.")
        check_choice("order", order, get_args(Order))
        super().__init__(**options)
        self.order = order
        self.sentences = sentences
        self.distractor_names = distractor_names
        self.names = single_token_words(self.encoder, self.name, "names", MINIMUM_NAMES)
        self.places = single_token_words(self.encoder, self.name, "places", MINIMUM_OTHERS)
        self.objects = single_token_words(self.encoder, self.name, "objects", MINIMUM_OTHERS)
        data = read_data("templates")
        self.templates: tuple[str, ...] = tuple(
            data["templates"] if sentences == "varied" else read_data("ioi_literature")
        )
        self._openings: list[str] = data["openings"]
        self._openings_with_name: list[str] = data["openings_with_name"]
        self._places_with_name: list[str] = data["places_with_name"]

    def draw(self, random: random.Random) -> Prompt:
        """Draw a scene and put it into words."""
        return self.draw_scene(random).prompt

    def draw_scene(self, random: random.Random) -> Scene:
        """Draw the people, place, object, template and order of the names."""
        first, second, *others = random.sample(self.names, MINIMUM_NAMES)
        template = random.choice(self.templates)
        return Scene(
            template=template,
            frame=self._frame(random, template, bystander=others[3]),
            indirect_object=first,
            subject=second,
            unrelated=(others[0], others[1], others[2]),
            subject_first=random.random() < 0.5 if self.order == "mixed" else self.order == "BABA",
        )

    def _frame(self, random: random.Random, template: str, bystander: str) -> str:
        opening, place = random.choice(self._openings), "{place}"
        if random.random() < self.distractor_names:
            if random.random() < 0.5:
                opening = random.choice(self._openings_with_name)
            else:
                place = random.choice(self._places_with_name)
        fillings = {
            "{opening}": opening,
            "{place}": place.replace("{place}", random.choice(self.places)),
            "{object}": random.choice(self.objects),
            "{C}": bystander,
        }
        for slot, filling in fillings.items():
            template = template.replace(slot, filling)
        return template

    def describe(self) -> dict[str, Any]:
        """Everything that determines the prompts, as plain values for the header of an artefact."""
        words = (*self.names, *self.places, *self.objects, *self.templates)
        return {
            **super().describe(),
            "order": self.order,
            "sentences": self.sentences,
            "distractor_names": self.distractor_names,
            "words": f"{derive_seed(*words):016x}",
        }
