"""Subject-verb agreement: "I think that the authors near the guard usually" -> " are", " have", " know"."""

from collections.abc import Iterator
from typing import ClassVar

from oa_train.seeds import derive_seed
from oa_train.tasks.builtin_records import ShippedRecords
from oa_train.tasks.file_formats import Fields
from oa_train.tasks.grammar import end_span, fill
from oa_train.tasks.vocabulary import read_data, require_enough

MINIMUM_NOUNS = 10
MINIMUM_VERBS = 2


class Agreement(ShippedRecords):
    """Choose the number of a verb whose subject is followed by another noun, the attractor.

    Answers are the forms of common verbs that agree with the subject, distractors those that do not. Attractors are
    singular or plural. The counterfactual has the subject in the other number. All prompts of a subject are in one
    stream. Spans: `subject`, `attractor`, `end` (the last token).
    """

    name: ClassVar[str] = "agreement"

    def rows(self) -> Iterator[Fields]:
        """A row for each sentence, subject, and grammatical number of subject and attractor.

        Raises:
            TaskError: too few nouns or verbs are single tokens in both numbers.
        """
        data = read_data("agreement")
        nouns = self._single_tokens("nouns", data["nouns"], MINIMUM_NOUNS)
        verbs = self._single_tokens("verbs", data["verbs"], MINIMUM_VERBS)
        forms = [[f" {form}" for form in number] for number in zip(*verbs, strict=True)]
        for place, subject in enumerate(nouns):
            others = nouns[:place] + nouns[place + 1 :]
            for template in data["templates"]:
                attractor = others[derive_seed("attractor", template, subject[0]) % len(others)]
                for number, form in ((number, form) for number in (0, 1) for form in attractor):
                    text, places = fill(template, subject=subject[number], attractor=form)
                    yield {
                        "prompt": text,
                        "answers": forms[number],
                        "wrong_answers": forms[1 - number],
                        "counterfactual": template.format(subject=subject[1 - number], attractor=form),
                        "spans": {**places, "end": end_span(text)},
                        "group": subject[0],
                    }

    def _single_tokens(self, kind: str, words: dict[str, str], minimum: int) -> list[tuple[str, str]]:
        """Words of which both the singular and the plural are single tokens."""
        kept = [pair for pair in words.items() if all(map(self.encoder.is_single_token, pair))]
        require_enough(
            [singular for singular, _ in kept],
            list(words),
            task=self.name,
            what=f"{kind} are single tokens in both numbers",
            minimum=minimum,
        )
        return kept
