"""Greater-than: "The war lasted from the year 1732 to the year 17" -> any two digits above 32."""

import random
from typing import Any

from oa_train.seeds import derive_seed
from oa_train.tasks.grammar import GrammarTask, end_span, fill
from oa_train.tasks.task import Prompt, Question
from oa_train.tasks.vocabulary import require_enough, single_token_words

SENTENCE = "The {noun} lasted from the year {begin}{start} to the year {begin}"
DIGITS = tuple("0123456789")
YEARS = tuple(f"{year:02d}" for year in range(100))
CENTURIES = tuple(str(century) for century in range(10, 19))
# The first decade of each century is left out, because no tens digit is too small there.
DECADES = tuple(century + tens for century in CENTURIES for tens in DIGITS[1:])

# Ways to split a year: its first digits, the endings that complete them, and the ending of the counterfactual, for
# which (nearly) every other ending is an answer.
CUTS = (
    (CENTURIES, YEARS, "01"),
    (DECADES, DIGITS, "0"),
)

MINIMUM_NOUNS = 2
MINIMUM_YEARS = 20


class GreaterThan(GrammarTask):
    """Predict the end year of a period from its start year.

    The text ends before the last token of the end year, whose first digits are those of the start year. Answers are
    all last tokens that make a later year, distractors all others. If the tokenizer has two-digit tokens, like
    GPT-2's, the text ends with the century ("1732 to the year 17"). If the last digit is a separate token, it ends
    with the decade ("1732 to the year 173"); if the tens digit is one too, it is the answer to an earlier question,
    for which the digits that a later year can have (3 and above) are right and all others are distractors.

    The counterfactual starts in the second year of the same century, or in the first of the same decade. Spans:
    `noun`, `year` (the last token of the start), `end` (the last token).

    Attributes:
        nouns: events that are single tokens.
        years: for each group of first digits, the endings of years that are one token after them.
        starts: first digits and endings of the years in which a period may start.
    """

    name = "greater_than"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.nouns = single_token_words(self.encoder, self.name, "nouns", MINIMUM_NOUNS)
        for begins, endings, earliest in CUTS:
            self._earliest = earliest
            # The first digits keep the tokens that they have by themselves.
            self.years = {begin: tuple(end for end in endings if self._continues(begin, end)) for begin in begins}
            self.starts = [
                (begin, start)
                for begin, ends in self.years.items()
                if earliest in ends
                for start in ends[:-1]  # no year comes after the last one
                if start > earliest
            ]
            if len(self.starts) >= MINIMUM_YEARS:
                break
        require_enough(
            [begin + start for begin, start in self.starts],
            [century + year for century in CENTURIES for year in YEARS],
            task=self.name,
            what="years end with a token of two digits or of one",
            minimum=MINIMUM_YEARS,
        )

    def _continues(self, begin: str, end: str) -> bool:
        return self.encoder.continuation(f"year {begin}", end) is not None

    def draw(self, random: random.Random) -> Prompt:
        """Draw an event and the year in which it starts."""
        begin, start = random.choice(self.starts)
        noun = random.choice(self.nouns)
        years = self.years[begin]
        text, places = fill(SENTENCE, noun=noun, begin=begin, start=start)
        return Prompt(
            text=text,
            answers=tuple(year for year in years if year > start),
            distractors=tuple(year for year in years if year <= start),
            counterfactual=SENTENCE.format(noun=noun, begin=begin, start=self._earliest),
            earlier=self._tens(text, begin),
            spans={"noun": places["noun"], "year": places["start"], "end": end_span(text)},
        )

    def _tens(self, text: str, begin: str) -> tuple[Question, ...]:
        """Earlier question that the tens digit of the end year answers, if that digit is a separate token."""
        century, tens = begin[:2], begin[2:]
        if not tens or not all(self._continues(century, digit) for digit in DIGITS):
            return ()
        answers = tuple(digit for digit in DIGITS if digit >= tens)
        return (Question(text[:-1], answers, tuple(digit for digit in DIGITS if digit < tens)),)

    def describe(self) -> dict[str, Any]:
        """Everything that determines the prompts, as plain values for the header of an artefact."""
        words = (*self.nouns, *(begin + start for begin, start in self.starts))
        return {**super().describe(), "words": f"{derive_seed(*words):016x}"}
