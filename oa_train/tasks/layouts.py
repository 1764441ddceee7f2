"""Layouts of prompt files: the fields of their rows, and their conversion to the fields of `Records`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oa_train.errors import nearest_names
from oa_train.tasks.file_formats import Fields, RowError, shared_length, shorten

# The fields of a prompt that `Records` reads and `Task.save` writes, and to which every other layout is converted.
OWN_FIELDS = (
    "prompt",
    "answer",
    "answers",
    "wrong_answer",
    "wrong_answers",
    "counterfactual",
    "spans",
    "earlier",
    "split",
    "group",
    "as_written",
)


@dataclass(frozen=True)
class Layout:
    """Layout of the rows of a file.

    Attributes:
        source: package or benchmark whose files have this layout.
        required: fields that a row must have; a dot leads into an object (`metadata.subject`).
        convert: maps a row to the fields of `Records`.
        optional: other fields that a row may have; None allows any, and ignores them.
    """

    source: str
    required: tuple[str, ...]
    convert: Callable[[Fields], Fields]
    optional: tuple[str, ...] | None = None

    def fits(self, fields: Fields) -> bool:
        """True if a row has all fields that this layout needs, and none that it does not know."""
        known = None if self.optional is None else {*self.required, *self.optional}
        return all(not _is_empty(value_at(fields, name)) for name in self.required) and (
            known is None or fields.keys() <= known
        )

    def read(self, fields: Fields) -> Fields:
        """A row converted to the fields of `Records`.

        Raises:
            RowError: a field is missing, empty, unknown, or not of this layout.
        """
        fields = {name: value for name, value in fields.items() if not _is_empty(value)}
        if self.optional is not None:
            known = (*dict.fromkeys(name.partition(".")[0] for name in self.required), *self.optional)
            for name in fields:
                if name not in known:
                    raise RowError(f"unknown field {name!r}. {nearest_names(name, known)}", shorten(fields[name]))
        for name in self.required:
            if _is_empty(value_at(fields, name)):
                detail = f"its fields are {', '.join(fields) or 'none'}"
                raise RowError(f"no value for the field {name!r}", detail)
        try:
            return self.convert(fields)
        except (TypeError, KeyError, IndexError, AttributeError, ValueError) as problem:
            if isinstance(problem, RowError):
                raise
            raise RowError(f"not as {self.source} has it", f"{problem!r} in {shorten(fields)}") from None


def value_at(fields: Any, name: str) -> Any:
    """Value of a field; a dot in its name leads into an object; None if there is none."""
    for part in name.split("."):
        fields = fields.get(part) if isinstance(fields, dict) else None
    return fields


def _is_empty(value: Any) -> bool:
    # NaN, pandas' missing value, is the only one that differs from itself.
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _renamed(**names: str) -> Callable[[Fields], Fields]:
    """Conversion of a layout that only names fields differently: `own=theirs`."""
    return lambda fields: {own: value_at(fields, theirs) for own, theirs in names.items()}


def _own(fields: Fields) -> Fields:
    if ("answer" in fields) == ("answers" in fields):
        both = "answer" in fields
        raise RowError(
            "both `answer` and `answers`" if both else "no value for the field 'answer' (or 'answers')",
            f"its fields are {', '.join(fields)}",
        )
    return fields


def _choices(fields: Fields) -> Fields:
    """MIB's multiple choice: the answer is the label of the right choice, the others are wrong."""
    choices = fields["choices"]
    labels = choices["label"] if isinstance(choices, dict) else [choice["label"] for choice in choices]
    key = fields["answerKey"]
    answer = labels[key] if isinstance(key, int) else key
    if answer not in labels:
        raise RowError("answerKey is none of the choices", f"{key!r} of {', '.join(labels)}")
    return {
        "prompt": fields["prompt"],
        "answers": [answer],
        "wrong_answers": [label for label in labels if label != answer],
        "counterfactual": value_at(fields, "symbol_counterfactual.prompt"),
    }


def _years(year_field: str) -> Callable[[Fields], Fields]:
    """Greater-than: the field holds the last two digits of the start year; answers are all later ones."""

    def convert(fields: Fields) -> Fields:
        start = int(str(fields[year_field])[-2:])
        return {
            "prompt": fields["clean"],
            "counterfactual": fields["corrupted"],
            "answers": [f"{year:02d}" for year in range(start + 1, 100)],
            "wrong_answers": [f"{year:02d}" for year in range(start + 1)],
            "group": fields["clean"].partition(" from ")[0],
        }

    return convert


def _predicted(fields: Fields) -> Fields:
    """Edge-Pruning: "1 + 2 = <predict>3</predict>"."""
    prompt, opening, rest = fields["clean"].partition("<predict>")
    if not opening:
        raise RowError("no <predict> in `clean`", shorten(fields["clean"]))
    answer = rest.partition("</predict>")[0]
    other, _, wrong = fields["corrupted"].partition("<predict>")
    wrong = wrong.partition("</predict>")[0]
    return {
        "prompt": prompt,
        "answers": [answer],
        "wrong_answers": [wrong] if wrong.strip() not in ("", answer.strip()) else [],
        "counterfactual": other,
    }


def _fact(fields: Fields) -> Fields:
    """CounterFact: a relation as a template, its subject, the true object and another one."""
    rewrite = fields["requested_rewrite"]
    subject, template = rewrite["subject"], rewrite["prompt"]
    start = template.index("{}")
    return {
        "prompt": template.replace("{}", subject),
        "answers": [rewrite["target_true"]["str"]],
        "wrong_answers": [rewrite["target_new"]["str"]],
        "spans": {"subject": [start, start + len(subject)]},
        "group": subject,
    }


def _known(fields: Fields) -> Fields:
    """known_1000: facts with the subject named; `attribute` is the true object."""
    prompt, subject = fields["prompt"], fields["subject"]
    start = prompt.find(subject)
    if start < 0:
        raise RowError("the subject is not in the prompt", f"{subject!r} in {shorten(prompt)}")
    return {
        "prompt": prompt,
        "answers": [fields["attribute"]],
        "spans": {"subject": [start, start + len(subject)]},
        "group": subject,
    }


def _circuitkit(fields: Fields) -> Fields:
    choices = fields.get("choices") or []
    if isinstance(choices, str):
        choices = json.loads(choices)
    wrong = [fields["corrupted_answer"]] if "corrupted_answer" in fields else choices
    return {
        "prompt": fields["prompt"],
        "answers": [fields["answer"]],
        "wrong_answers": [choice for choice in wrong if str(choice).strip() != str(fields["answer"]).strip()],
        "counterfactual": fields.get("corrupted_prompt", fields.get("corrupted")),
    }


def _minimal_pair(fields: Fields) -> Fields:
    """BLiMP: two sentences; the prompt is their common beginning in whole words, the answers are the continuations."""
    good, bad = fields["sentence_good"], fields["sentence_bad"]
    shared = good[: shared_length([good, bad])]
    start = shared.rfind(" ") if len(shared) < min(len(good), len(bad)) else -1
    if start < 1:
        raise RowError(
            "the sentences do not share their first word, or one begins the other", shorten(f"{good} / {bad}")
        )
    return {"prompt": good[:start], "answers": [good[start:]], "wrong_answers": [bad[start:]]}


LAYOUTS: dict[str, Layout] = {
    "own": Layout("oa_train", ("prompt",), _own, OWN_FIELDS),
    "mib_ioi": Layout(
        "MIB",
        ("prompt", "metadata.indirect_object", "metadata.subject"),
        _renamed(
            prompt="prompt",
            answers="metadata.indirect_object",
            wrong_answers="metadata.subject",
            counterfactual="s2_io_flip_counterfactual.prompt",
        ),
    ),
    "mib_choices": Layout("MIB", ("prompt", "choices", "answerKey"), _choices),
    "mib_arithmetic": Layout(
        "MIB",
        ("prompt", "label"),
        _renamed(
            prompt="prompt",
            answers="label",
            wrong_answers="random_counterfactual.label",
            counterfactual="random_counterfactual.prompt",
        ),
    ),
    "mib_greater_than": Layout("MIB", ("clean", "corrupted", "year"), _years("year")),
    "eap_ig_ioi": Layout(
        "EAP-IG",
        ("clean", "corrupted", "correct_idx", "incorrect_idx"),
        _renamed(
            prompt="clean",
            counterfactual="corrupted",
            answer_id="correct_idx",
            wrong_answer_id="incorrect_idx",
        ),
    ),
    "eap_ig_greater_than": Layout("EAP-IG", ("clean", "corrupted", "label"), _years("label")),
    "auto_circuit": Layout(
        "auto-circuit",
        ("clean", "corrupt", "answers", "wrong_answers"),
        _renamed(prompt="clean", counterfactual="corrupt", answers="answers", wrong_answers="wrong_answers"),
    ),
    "edge_pruning": Layout("Edge-Pruning", ("clean", "corrupted"), _predicted),
    "counterfact": Layout(
        "CounterFact",
        (
            "requested_rewrite.prompt",
            "requested_rewrite.subject",
            "requested_rewrite.target_true.str",
            "requested_rewrite.target_new.str",
        ),
        _fact,
    ),
    "known_1000": Layout("known_1000", ("prompt", "subject", "attribute"), _known),
    "sva": Layout(
        "feature-circuits",
        ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer"),
        _renamed(
            prompt="clean_prefix",
            counterfactual="patch_prefix",
            answers="clean_answer",
            wrong_answers="patch_answer",
        ),
    ),
    "circuitkit": Layout(
        "CircuitKit",
        ("prompt", "answer"),
        _circuitkit,
        ("corrupted", "corrupted_prompt", "corrupted_answer", "choices"),
    ),
    "blimp": Layout("BLiMP", ("sentence_good", "sentence_bad"), _minimal_pair),
}
