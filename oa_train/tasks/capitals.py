"""Capitals: "The capital of France is the city of" -> " Paris"."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from oa_train.tasks.fact_records import FactRecords
from oa_train.tasks.subject_pairs import Objects
from oa_train.tasks.vocabulary import read_data


class Capitals(FactRecords):
    """Name the capital of a country.

    Countries are paired (see `FactRecords`). Spans: `subject` (the country), `end` (the last token).
    """

    name: ClassVar[str] = "capitals"
    subjects_are: ClassVar[str] = "countries"

    def facts(self) -> Mapping[str, Objects]:
        """The capital of each country, with all its spellings."""
        return {country: {"capital": names.split("|")} for country, names in read_data("capitals")["capitals"].items()}

    def sentences(self) -> Mapping[str, Sequence[str]]:
        """The sentences about capitals."""
        return {"capital": read_data("capitals")["templates"]}
