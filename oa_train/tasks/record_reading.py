"""Records: prompts read from rows of files, not yet tokenised."""

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from oa_train.errors import nearest_names
from oa_train.seeds import derive_seed
from oa_train.tasks.encoding import Span, needs_space
from oa_train.tasks.file_formats import Fields, Row, RowError, shorten
from oa_train.tasks.layouts import Layout
from oa_train.tasks.task import Prompt, Question, Stream

LeadingSpace = Literal["auto", "as_written"]

SPLIT_NAMES: dict[str, Stream] = {
    "train": "train",
    "refit": "refit",
    "means": "means",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Record:
    """A row as its layout reads it, not yet tokenised.

    Attributes:
        place: its location in the file, for messages.
        prompt: the prompt as text; answers and distractors may be several tokens long.
        split: its stream, if the file names it.
        group: prompts of the same group are in the same stream.
    """

    place: str
    prompt: Prompt
    split: Stream | None = None
    group: str = ""


@dataclass
class RecordReader:
    """Turns rows into records, and collects the problems of those that cannot be used."""

    layout: Layout
    decode: Callable[[list[int]], object]
    leading_space: LeadingSpace
    ignored_fields: Sequence[str]
    max_prompts: int
    n_rows: int = 0
    n_records: int = 0
    n_repeated: int = 0
    n_spaced: int = 0
    spaced: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, RowError]] = field(default_factory=list)
    misfit: Fields | None = None  # the first row that is not of the layout

    def read(self, rows: Iterable[Row]) -> list[Record]:
        """Records in the order of the file, at most `max_prompts`."""
        kept: dict[str, Record] = {}
        smallest: list[tuple[int, str]] = []
        for row in rows:
            self.n_rows += 1
            try:
                record = self._record(row)
                self._compare(record, kept.get(record.prompt.text))
            except RowError as problem:
                self.problems.append((row.place, problem))
                continue
            text = record.prompt.text
            if text in kept:
                self.n_repeated += 1
                continue
            self.n_records += 1
            kept[text] = record
            heapq.heappush(smallest, (-derive_seed("kept", text), text))
            if len(kept) > self.max_prompts:
                del kept[heapq.heappop(smallest)[1]]
        return list(kept.values())

    def remarks(self) -> Iterator[str]:
        """Remarks on how the rows were read, for the terminal."""
        if self.n_records > self.max_prompts:
            used = f"{self.max_prompts:,} of {self.n_records:,} prompts are used (max_prompts)"
            yield f"{used}, those of the smallest hash."
        if self.n_repeated:
            yield f"{self.n_repeated} rows repeat the text of an earlier one and are used once."
        if self.n_spaced:
            examples = ", ".join(f"{written!r} as {spaced!r}" for written, spaced in list(self.spaced.items())[:3])
            yield f"{self.n_spaced} answers got a leading space ({examples})."

    def _compare(self, record: Record, earlier: Record | None) -> None:
        if earlier is None:
            return
        if record.split != earlier.split:
            detail = (
                f"{record.split or 'none'} here and {earlier.split or 'none'} in {earlier.place}: "
                f"{shorten(record.prompt.text)}"
            )
            raise RowError("the same prompt in two splits", detail)
        if record.prompt.answers != earlier.prompt.answers:
            detail = f"{list(record.prompt.answers)} here and {list(earlier.prompt.answers)} in {earlier.place}"
            raise RowError("the same prompt with other answers", f"{detail}: {shorten(record.prompt.text)}")

    def _record(self, row: Row) -> Record:
        if isinstance(row.content, RowError):
            raise row.content
        content = {name: value for name, value in row.content.items() if name not in self.ignored_fields}
        split = content.pop("split", None)
        try:
            fields = {"split": split, **self.layout.read(content)}
        except RowError:
            self.misfit = self.misfit or content
            raise
        text = _text("prompt", fields["prompt"])
        counterfactual = fields.get("counterfactual")
        other = None if counterfactual is None else _text("counterfactual", counterfactual)
        if other is not None and other == text:
            raise RowError("the counterfactual is the prompt itself", shorten(text))
        as_written = self.leading_space == "as_written" or bool(_parsed(fields.get("as_written")))
        # A separate token for a space at the end would get in the way of answers that begin with one.
        moved = not as_written and text.endswith(" ") and not text.endswith("  ")
        if moved:
            text, other = text[:-1], other.removesuffix(" ") if other is not None else None
        spacing = "none" if as_written else "always" if moved else "auto"
        for name in ("answer", "wrong_answer"):
            if fields.get(f"{name}_id") is not None:
                fields[name] = self._token(fields[f"{name}_id"], text)
        answers = self._answers(fields, "answer", text, spacing)
        if not answers:
            raise RowError("no value for the field 'answer' (or 'answers')", shorten(fields))
        wrong = self._answers(fields, "wrong_answer", text, spacing)
        both = [answer for answer in answers if answer in wrong]
        if both:
            raise RowError("an answer that is a wrong answer as well", shorten(both[0]))
        group = fields.get("group")
        return Record(
            row.place,
            Prompt(
                text=text,
                answers=answers,
                distractors=wrong,
                counterfactual=other,
                earlier=tuple(_question(value) for value in _parsed(fields.get("earlier")) or ()),
                spans=_spans(_parsed(fields.get("spans")) or {}, len(text)),
            ),
            stream_named(fields["split"]),
            text if group is None else str(group),
        )

    def _token(self, number: Any, text: str) -> str:
        """Text of a token id; raises a `RowError` if the file was made with another model's tokenizer."""
        token = str(self.decode([int(number)]))
        if token.strip() not in text:
            detail = f"{number} is {token!r} here, and not in {shorten(text)}"
            raise RowError("the id of a token of another model's tokenizer", detail)
        return token

    def _answers(self, fields: Fields, name: str, text: str, spacing: str) -> tuple[str, ...]:
        value = fields.get(f"{name}s", fields.get(name))
        if f"{name}s" in fields:
            value = _parsed(value) if isinstance(value, str) and value.startswith("[") else value
        values = [] if value is None else value if isinstance(value, list | tuple) else [value]
        answers = []
        for written in values:
            answer = _text(name, written)
            if spacing == "always":
                answer = f" {answer.lstrip(' ')}"
            elif spacing == "auto" and needs_space(text, answer):
                answer = f" {answer}"
            if answer != written:
                self.n_spaced += 1
                self.spaced.setdefault(str(written), answer)
            answers.append(answer)
        return tuple(dict.fromkeys(answers))


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"`{name}` is not text", f"{shorten(value)}, a {type(value).__name__}")
    # pandas reads a column of integers with a missing value as floats.
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if not text.strip():
        raise RowError(f"`{name}` is empty", repr(text))
    return text


def _parsed(value: Any) -> Any:
    """Value of a field that is not text, which a CSV cell holds as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise RowError("a cell that is not JSON", shorten(value)) from None


def _spans(spans: Any, end: int) -> dict[str, Span]:
    if not isinstance(spans, Mapping):
        raise RowError("`spans` is not an object", f"{shorten(spans)}; expected {{name: [start, end] or a substring}}")
    read: dict[str, Span] = {}
    for name, span in spans.items():
        if isinstance(span, list | tuple) and len(span) == 2 and all(type(number) is int for number in span):
            read[name] = (span[0], min(span[1], end) if span[1] == end + 1 else span[1])
        elif isinstance(span, str):
            read[name] = span
        elif span is not None:
            raise RowError(
                "a span of the wrong form", f"{name}: {shorten(span)}; expected [start, end] or a substring"
            )
    return read


def _question(value: Any) -> Question:
    try:
        return Question(value["prompt"], tuple(value["answers"]), tuple(value.get("wrong_answers", ())))
    except (TypeError, KeyError, AttributeError):
        expected = "{prompt, answers, wrong_answers}"
        raise RowError("an earlier question of the wrong form", f"{shorten(value)}; expected {expected}") from None


def stream_named(split: Any) -> Stream | None:
    """The stream that a split name stands for; None without a name.

    Raises:
        RowError: the name is unknown.
    """
    if split is None:
        return None
    stream = SPLIT_NAMES.get(str(split).strip().lower())
    if stream is None:
        raise RowError(f"unknown split {str(split)!r}. {nearest_names(str(split), SPLIT_NAMES)}", f"split: {split!r}")
    return stream
