"""Prompts that ask for the object of a fact; the counterfactual names another subject."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from oa_train.errors import TaskError
from oa_train.tasks.builtin_records import ShippedRecords
from oa_train.tasks.file_formats import Fields
from oa_train.tasks.grammar import end_span, fill
from oa_train.tasks.subject_pairs import Objects, pair_name, pair_subjects
from oa_train.tasks.task import Stream

MINIMUM_SUBJECTS = 10


class FactRecords(ShippedRecords):
    """Task of facts (relation, subject, object), expressed in the sentences of their relation.

    Subjects with the same relations are paired: the counterfactual names another subject with the same number of
    tokens, whose object begins with a different token and is the distractor. Paired subjects are in the same stream,
    with all their facts. Subjects without a possible partner are left out, and a remark says so. Spans: `subject`,
    `end` (the last token).

    Attributes:
        subjects_are: plural noun for the subjects, for messages.
    """

    subjects_are: ClassVar[str] = "subjects"

    @abstractmethod
    def facts(self) -> Mapping[str, Objects]:
        """The objects of each subject, by relation; several if an object has several names."""

    @abstractmethod
    def sentences(self) -> Mapping[str, Sequence[str]]:
        """The sentences of each relation, with the slot {subject}."""

    def split(self, pair: str) -> Stream | None:
        """Stream of a pair of subjects; None lets `Records` make the streams."""
        return None

    def rows(self) -> Iterator[Fields]:
        """A row for each sentence and each fact whose subject has a partner.

        Raises:
            TaskError: too few subjects have a partner.
        """
        facts, sentences = self.facts(), self.sentences()
        if self.answer_positions == "every":
            facts = {
                subject: {relation: names[:1] for relation, names in objects.items()}
                for subject, objects in facts.items()
            }
        partners = pair_subjects(self.encoder, facts)
        self._judge(facts, partners)
        for subject, other in partners.items():
            pair = pair_name(partners, subject)
            for relation, objects in facts[subject].items():
                for sentence in sentences[relation]:
                    text, places = fill(sentence, subject=subject)
                    yield {
                        "prompt": text,
                        "answers": [f" {name}" for name in objects],
                        "wrong_answers": [f" {name}" for name in facts[other][relation]],
                        "counterfactual": sentence.format(subject=other),
                        "spans": {"subject": places["subject"], "end": end_span(text)},
                        "group": pair,
                        "split": self.split(pair),
                    }

    def _judge(self, facts: Mapping[str, Objects], partners: Mapping[str, str]) -> None:
        """Refuse a tokenizer under which too few subjects have a partner, and remark on those without one."""
        if len(partners) < MINIMUM_SUBJECTS:
            unknown = sum(self._has_unknown_words(subject, objects) for subject, objects in facts.items())
            words = f" ({unknown} have words in name or answers that it does not know)" if unknown else ""
            raise TaskError(
                f"The task {self.name} cannot be posed to this tokenizer: {len(partners)} of the {len(facts)} "
                f"{self.subjects_are} have as many tokens as another one, whose answers begin with other tokens"
                f"{words}; at least {MINIMUM_SUBJECTS} are needed.\nChoose a model whose tokenizer knows their names, "
                "or another task."
            )
        if alone := [subject for subject in facts if subject not in partners]:
            self.remarks.append(
                f"{len(alone)} of {len(facts)} {self.subjects_are} are left out, because no other one has as many "
                f"tokens and answers that begin otherwise: {', '.join(alone)}."
            )

    def _has_unknown_words(self, subject: str, objects: Objects) -> bool:
        words = [subject, *(name for names in objects.values() for name in names)]
        return any(self.tokenizer.unk_token_id in row for row in self.encoder.encode(words))
