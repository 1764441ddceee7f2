"""Induction: a row of unrelated words, then one of them again; the answer is the word that followed it before."""

import random
from typing import Any, Literal, get_args

from oa_train.checks import check_at_least, check_choice
from oa_train.errors import ConfigurationError
from oa_train.seeds import derive_seed
from oa_train.tasks.grammar import GrammarTask, end_span, word_span
from oa_train.tasks.task import Prompt, Question
from oa_train.tasks.vocabulary import read_words, single_token_words, vocabulary_words

Vocabulary = Literal["list", "model"]

# Some text must precede the first word: tokenizers encode the very first word of a prompt differently.
OPENING = "Words:"


class Induction(GrammarTask):
    """Rows of words, some of which are repeated at the end.

    In "Words: river stone cloud window stone" the answer is " cloud", the word that followed "stone" before;
    distractors are the other words of the row. The counterfactual has another word at the first "stone", so that
    nothing predicts what follows the last one. With `answer_positions: every` each repeated word is a question.
    Spans: `first` (the earlier occurrence of the last word), `after` (the word that followed it there, the answer),
    `end` (the last token).

    For the repeated random tokens on which induction heads are usually measured, set `vocabulary: model`, `repeated`
    to one less than `length`, and `answer_positions: every`.

    Args:
        length: number of distinct words in the row, before those that are repeated.
        repeated: number of words that are repeated, in their original order.
        vocabulary: where the words come from: `list` is a list of concrete nouns, `model` all words of the model's
            vocabulary (tokens of letters after a space).
        **options: the options of every task (see `Task`).

    Attributes:
        words: words that are single tokens.
    """

    name = "induction"

    def __init__(self, *, length: int = 8, repeated: int = 1, vocabulary: Vocabulary = "list", **options: Any) -> None:
        check_at_least(3, length=length)  # a pair and one other word
        if not 1 <= repeated < length:
            raise ConfigurationError(
                f"repeated is {repeated}; expected 1 to {length - 1} words, so that one of the row follows them."
            )
        check_choice("vocabulary", vocabulary, get_args(Vocabulary))
        minimum = length + repeated  # the counterfactual has other words at the repeated places
        if vocabulary == "list" and minimum > (n_words := len(read_words("induction"))):
            raise ConfigurationError(
                f"length and repeated are {length} and {repeated}; expected a sum of at most {n_words}, the words of "
                "the task's list. Choose fewer, or vocabulary: model."
            )
        super().__init__(**options)
        self.length = length
        self.repeated = repeated
        self.vocabulary: Vocabulary = vocabulary
        if vocabulary == "list":
            self.words = single_token_words(self.encoder, self.name, "induction", minimum)
        else:
            self.words = vocabulary_words(self.encoder, self.name, minimum)

    def draw(self, random: random.Random) -> Prompt:
        """Draw the words and those that are repeated."""
        drawn = random.sample(self.words, self.length + self.repeated)
        row, replacements = drawn[: self.length], drawn[self.length :]
        place = random.randrange(self.length - self.repeated)  # a word of the row follows the repeated ones
        after = place + self.repeated
        again = row[place:after]
        *earlier, last = [self._question(row, again[: n + 1], row[place + n + 1]) for n in range(self.repeated)]
        words = [OPENING, *row]
        return Prompt(
            text=last.text,
            answers=last.answers,
            distractors=last.distractors,
            counterfactual=" ".join([OPENING, *row[:place], *replacements, *row[after:], *again]),
            earlier=tuple(earlier),
            spans={"first": word_span(words, after), "after": word_span(words, after + 1), "end": end_span(last.text)},
        )

    def _question(self, row: list[str], again: list[str], answer: str) -> Question:
        others = tuple(f" {word}" for word in row if word not in (again[-1], answer))
        return Question(" ".join([OPENING, *row, *again]), (f" {answer}",), others)

    def describe(self) -> dict[str, Any]:
        """Everything that determines the prompts, as plain values for the header of an artefact."""
        return {
            **super().describe(),
            "length": self.length,
            "repeated": self.repeated,
            "words": f"{derive_seed(*self.words):016x}",
        }
