"""Capitals: "The capital of France is the city of" -> " Paris"."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from oa_train.tasks.fact_records import FactRecords
from oa_train.tasks.pairing import Objects
from oa_train.tasks.vocabulary import read_data


class Capitals(FactRecords):
    """Name the capital of a country.

    Countries are paired: the counterfactual names another country with the same number of tokens, whose capital begins
    with a different token and is the distractor. Paired countries are in the same stream, with all their prompts.
    Countries without a possible partner are left out, and a remark says so. Spans: `subject` (the country), `end` (the
    last token).

    Args:
        **options: the options of every task (see `Task`), and `max_prompts` (see `Records`).
    """

    name: ClassVar[str] = "capitals"
    subjects_are: ClassVar[str] = "countries"

    def facts(self) -> Mapping[str, Objects]:
        """The capital of each country, with all its spellings."""
        return {country: {"capital": names.split("|")} for country, names in read_data("capitals")["capitals"].items()}

    def sentences(self) -> Mapping[str, Sequence[str]]:
        """The sentences about capitals."""
        return {"capital": read_data("capitals")["templates"]}
