"""Facts about invented people: "We heard that Kestra Lumo has lived for many years in" -> " Dunmoor"."""

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

from oa_train.seeds import derive_seed
from oa_train.tasks.fact_records import FactRecords
from oa_train.tasks.subject_pairs import Objects
from oa_train.tasks.task import Stream, stream_of
from oa_train.tasks.vocabulary import read_data


class SyntheticFacts(FactRecords):
    """Recall the town, the job or the instrument of an invented person, which the built-in model `facts` knows.

    Every ordered pair of different names is a person, and each person's three objects are drawn for that person alone:
    the object follows from both names in their order, and neither name tells it by itself. People are paired (see
    `FactRecords`), and the five streams share no person. Spans: `subject` (both names), `end` (the last token).
    """

    name: ClassVar[str] = "synthetic_facts"
    subjects_are: ClassVar[str] = "people"

    def facts(self) -> Mapping[str, Objects]:
        """The objects of each person, by relation."""
        data = read_data("synthetic_facts")
        people = (" ".join(names) for names in itertools.permutations(data["names"], 2))
        return {
            person: {
                relation: [content["objects"][derive_seed("fact", relation, person) % len(content["objects"])]]
                for relation, content in data["relations"].items()
            }
            for person in people
        }

    def sentences(self) -> Mapping[str, Sequence[str]]:
        """The sentences of each relation."""
        return {
            relation: content["templates"] for relation, content in read_data("synthetic_facts")["relations"].items()
        }

    def split(self, pair: str) -> Stream:
        """Stream of a pair of people, by a hash of their names."""
        return stream_of(pair)
