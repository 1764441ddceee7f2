"""Well-known facts: "The main language spoken in Brazil is" -> " Portuguese"."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from oa_train.errors import ConfigurationError, unknown_name
from oa_train.tasks.fact_records import FactRecords
from oa_train.tasks.subject_pairs import Objects
from oa_train.tasks.vocabulary import read_data


class Facts(FactRecords):
    """Name the object of a well-known fact.

    The relations are capital, language, currency and continent of a country, country of a city, city of a landmark,
    symbol of an element, and country of a company. Subjects are paired (see `FactRecords`). Objects of several tokens
    are scored by their first. Spans: `subject`, `end` (the last token).

    Args:
        relations: names of the relations that are asked for: `capital`, `language`, `currency`, `continent`,
            `country`, `landmark`, `symbol`, `company`; all by default.
        **options: the options of every task (see `Task`), and `max_prompts` (see `Records`).

    Raises:
        UnknownNameError: a relation is unknown.
    """

    name: ClassVar[str] = "facts"

    def __init__(self, *, relations: list[str] | None = None, **options: Any) -> None:
        known = read_data("facts")
        for relation in relations or ():
            if relation not in known:
                raise unknown_name("relation", relation, known)
        if relations is not None and not relations:
            raise ConfigurationError(f"relations is empty; expected some of {', '.join(known)}, or none for all.")
        self.relations = tuple(relation for relation in known if relations is None or relation in relations)
        super().__init__(**options)

    def facts(self) -> Mapping[str, Objects]:
        """The objects of each subject, by relation."""
        facts: dict[str, dict[str, list[str]]] = defaultdict(dict)
        for relation in self.relations:
            for subject, names in read_data("facts")[relation]["facts"].items():
                facts[subject][relation] = names.split("|")
        return facts

    def sentences(self) -> Mapping[str, Sequence[str]]:
        """The sentences of each relation."""
        return {relation: read_data("facts")[relation]["templates"] for relation in self.relations}

    def describe(self) -> dict[str, Any]:
        """Everything that determines the prompts, as plain values for the header of an artefact."""
        return {**super().describe(), "relations": list(self.relations)}
