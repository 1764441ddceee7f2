"""Capitals: "The capital of France is the city of" -> " Paris"."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import ClassVar

from oa_train.errors import TaskError
from oa_train.seeds import derive_seed
from oa_train.tasks.encoding import CONTEXT
from oa_train.tasks.grammar import end_span, fill
from oa_train.tasks.record_files import Fields, shared_length
from oa_train.tasks.shipped import ShippedRecords
from oa_train.tasks.vocabulary import read_data

MINIMUM_COUNTRIES = 10


class Capitals(ShippedRecords):
    """Name the capital of a country.

    Countries are paired: the counterfactual names another country of as many tokens, whose capital begins with another
    token and is the distractor. Paired countries are in the same stream, with all their prompts. Countries that no
    other one can be paired with are left out, which a remark says. Spans: `subject` (the country), `end` (the last
    token).

    Args:
        **options: the options of every task (see `Task`), and `max_prompts` (see `Records`).
    """

    name: ClassVar[str] = "capitals"

    def rows(self) -> Iterator[Fields]:
        """A row for each sentence and country that has a partner.

        Raises:
            TaskError: too few have one.
        """
        data = read_data("capitals")
        capitals = {country: names.split("|") for country, names in data["capitals"].items()}
        if self.answer_positions == "every":
            capitals = {country: names[:1] for country, names in capitals.items()}
        partners = self._partners(capitals)
        if len(partners) < MINIMUM_COUNTRIES:
            raise TaskError(
                f"The task {self.name} cannot be posed to this tokenizer: {len(partners)} of the {len(capitals)} "
                "countries have as many tokens as another one, whose capital begins with another token; at least "
                f"{MINIMUM_COUNTRIES} are needed.\nChoose a model whose tokenizer knows their names, or another task."
            )
        if alone := [country for country in capitals if country not in partners]:
            self.remarks.append(
                f"{len(alone)} of {len(capitals)} countries are left out, because no other one has as many tokens and "
                f"a capital that begins otherwise: {', '.join(alone)}."
            )
        for country, other in partners.items():
            for template in data["templates"]:
                text, places = fill(template, country=country)
                yield {
                    "prompt": text,
                    "answers": [f" {capital}" for capital in capitals[country]],
                    "wrong_answers": [f" {capital}" for capital in capitals[other]],
                    "counterfactual": template.format(country=other),
                    "spans": {"subject": places["country"], "end": end_span(text)},
                    "group": min(other, partners[other]),
                }

    def _partners(self, capitals: dict[str, list[str]]) -> dict[str, str]:
        """Another country for each; mutual, but for the last of an odd number."""
        by_length: dict[int, list[str]] = defaultdict(list)
        for country, tokens in zip(capitals, self._word_tokens(capitals), strict=True):
            by_length[len(tokens)].append(country)
        tokens_of = {country: self._word_tokens(names) for country, names in capitals.items()}
        # Some tokenizers have a token for the space before a word.
        space = shared_length([tokens for names in tokens_of.values() for tokens in names])
        firsts = {country: {tuple(tokens[: space + 1]) for tokens in names} for country, names in tokens_of.items()}
        partners: dict[str, str] = {}
        for countries in by_length.values():
            waiting = sorted(countries, key=lambda country: derive_seed("partner", country))
            while waiting:
                country = waiting.pop()
                others = (other for other in (*waiting, *countries) if not firsts[country] & firsts[other])
                other = next(others, None)
                if other in waiting:
                    waiting.remove(other)
                    partners[other] = country
                if other is not None:
                    partners[country] = other
        return partners

    def _word_tokens(self, words: Iterable[str]) -> list[list[int]]:
        """Tokens of each word after another one."""
        before, *rows = self.encoder.encode([CONTEXT, *(f"{CONTEXT} {word}" for word in words)])
        return [row[len(before) :] for row in rows]
