"""Greater-than: "The war lasted from the year 1732 to the year 17" -> any two digits above 32."""

import random
from typing import Any

from oa_train.seeds import derive_seed
from oa_train.tasks.grammar import GrammarTask, end_span, fill
from oa_train.tasks.task import Prompt
from oa_train.tasks.vocabulary import require_enough, single_token_words

SENTENCE = "The {noun} lasted from the year {century}{year} to the year {century}"
CENTURIES = tuple(str(century) for century in range(10, 19))
YEARS = tuple(f"{year:02d}" for year in range(100))

# The counterfactual starts in this year, after which every year of the century is an answer.
EARLY_YEAR = "01"

MINIMUM_NOUNS = 2
MINIMUM_YEARS = 20


class GreaterThan(GrammarTask):
    """Predict the year in which a period ends, after the year of its start.

    Answers are all two-digit years after the start, distractors all others. The counterfactual starts in the second
    year of the same century. Spans: `noun`, `year` (the two digits of the start after its century), `end` (the
    last token).

    Args:
        **options: the options of every task (see `Task`).

    Attributes:
        nouns: events that are single tokens.
        years: the two-digit years of each century that are one token after it.
        starts: centuries and years in which a period may start.
    """

    name = "greater_than"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.nouns = single_token_words(self.encoder, self.name, "nouns", MINIMUM_NOUNS)
        # A year is one token after its century, which keeps the tokens that it has alone.
        self.years = {
            century: tuple(year for year in YEARS if self.encoder.continuation(f"year {century}", year) is not None)
            for century in CENTURIES
        }
        self.starts = [
            (century, year)
            for century, years in self.years.items()
            if EARLY_YEAR in years
            for year in years[:-1]  # no year of the century comes after its last one
            if year > EARLY_YEAR
        ]
        require_enough(
            [century + year for century, year in self.starts],
            [century + year for century in CENTURIES for year in YEARS],
            task=self.name,
            what="years are a century and one further token",
            minimum=MINIMUM_YEARS,
        )

    def draw(self, random: random.Random) -> Prompt:
        """Draw an event and the year in which it starts."""
        century, start = random.choice(self.starts)
        noun = random.choice(self.nouns)
        years = self.years[century]
        text, places = fill(SENTENCE, noun=noun, century=century, year=start)
        return Prompt(
            text=text,
            answers=tuple(year for year in years if year > start),
            distractors=tuple(year for year in years if year <= start),
            counterfactual=SENTENCE.format(noun=noun, century=century, year=EARLY_YEAR),
            spans={"noun": places["noun"], "year": places["year"], "end": end_span(text)},
        )

    def describe(self) -> dict[str, Any]:
        """Everything that determines the prompts, as plain values for the header of an artefact."""
        words = (*self.nouns, *(century + year for century, year in self.starts))
        return {**super().describe(), "words": f"{derive_seed(*words):016x}"}
