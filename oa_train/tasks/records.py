"""Prompts from a file: your own, or those of other packages and benchmarks."""

import json
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, ClassVar, Literal, get_args

from oa_train.checks import check_at_least, check_choice
from oa_train.errors import ConfigurationError, TaskError, unknown_name
from oa_train.tasks.file_formats import Fields, Row, RowError, read_rows, report
from oa_train.tasks.finite_task import FiniteTask
from oa_train.tasks.layouts import LAYOUTS
from oa_train.tasks.record_fitting import RecordFitter
from oa_train.tasks.record_reading import LeadingSpace, RecordReader
from oa_train.tasks.record_streams import cut_into_streams
from oa_train.tasks.task import Prompt, Stream

BadRows = Literal["stop", "leave_out"]


class Records(FiniteTask):
    """Prompts from your own file, or from that of a benchmark.

    Answers may be written with or without their leading space, and may be several tokens long: they are scored on the
    first token in which answers and wrong answers differ, or on all tokens with `answer_positions: every`. Streams
    come from a column `split`, else from a hash of the prompts' text; `docs/data.md` has the rules.

    Args:
        path: file (.jsonl, .json, .csv, .tsv, .parquet), folder saved by `datasets`, or `hf://owner/name` on the Hub.
        layout: names of the fields; a key of `LAYOUTS`.
        rows: the rows themselves, in place of `path`.
        subset: configuration of a Hub dataset.
        bad_rows: `stop` with an error that lists all unusable rows, or `leave_out` those rows.
        leading_space: `auto` puts a space in front of an answer where one belongs, `as_written` changes nothing.
        max_prompts: at most this many prompts are kept: those with the smallest hash of their text.
        ignored_fields: fields that are skipped; other unknown fields are an error.
        **options: the options of every task (see `Task`).

    Attributes:
        streams: the prompts of each stream.
        places: place of each prompt in the file, by its text.
        left_out: rows that were left out, with their places.

    Raises:
        ConfigurationError: an option has a value that cannot work.
        ArtefactError: the file cannot be read.
        TaskError: rows cannot be used, or are too few.
    """

    name: ClassVar[str] = "records"

    def __init__(
        self,
        *,
        path: str | None = None,
        layout: str = "own",
        rows: list[dict[str, Any]] | None = None,
        subset: str | None = None,
        bad_rows: BadRows = "stop",
        leading_space: LeadingSpace = "auto",
        max_prompts: int = 10_000,
        ignored_fields: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        check_choice("bad_rows", bad_rows, get_args(BadRows))
        check_choice("leading_space", leading_space, get_args(LeadingSpace))
        if layout not in LAYOUTS:
            raise unknown_name("layout", layout, LAYOUTS)
        if (path is None) == (rows is None):
            raise ConfigurationError("Give data.path, a file of prompts, or data.rows, but not both.")
        check_at_least(1, max_prompts=max_prompts)
        super().__init__(**options)
        self.layout = layout
        self.source, content = self._content(path, subset, rows)
        self.left_out: list[tuple[str, RowError]] = []
        reader = RecordReader(LAYOUTS[layout], self.tokenizer.decode, leading_space, ignored_fields, max_prompts)
        records = reader.read(content)
        fitter = RecordFitter(self.encoder, self.answer_positions)
        fitted = fitter.fit(records, reader.problems)
        self._refuse(reader.problems, reader.n_rows, bad_rows, reader.misfit)
        self.remarks += [*reader.remarks(), *fitter.remarks(len(fitted))]
        self.streams: dict[Stream, list[Prompt]] = cut_into_streams(fitted, self.source)
        self.places = {record.prompt.text: record.place for record in fitted}
        self.cap_sizes()

    def _content(
        self, path: str | None, subset: str | None, rows: list[dict[str, Any]] | None
    ) -> tuple[str, Iterable[Row]]:
        """Name of the source for messages, and the rows."""
        if path is not None:
            return path, read_rows(path, subset)
        return "data.rows", (Row(f"row {number}", row) for number, row in enumerate(rows or [], start=1))

    def _refuse(
        self, problems: list[tuple[str, RowError]], n_rows: int, bad_rows: BadRows, example: Fields | None
    ) -> None:
        if n_rows == 0:
            raise TaskError(
                f"{self.source} has no rows. Expected one for each prompt, with the fields `prompt` and `answer`."
            )
        if not problems:
            return
        if bad_rows == "stop" or len(problems) == n_rows:
            unknown = any(problem.problem.startswith("unknown field") for _, problem in problems)
            extra = " To skip fields, name them in --data.ignored_fields." if unknown else ""
            raise TaskError(
                f"{self.source}: {len(problems)} of {n_rows} rows cannot be used.\n{report(problems)}\n"
                f"Fix them, or leave them out with --data.bad_rows leave_out.{extra}"
                f"{_other_layouts(example, self.layout)}"
            )
        self.left_out = problems
        self.remarks.append(f"{len(problems)} of {n_rows} rows are left out.")

    def prompt(self, stream: Stream, index: int) -> Prompt:
        """Prompt number `index` of a stream; train and refit start over at the end, in another order.

        Raises:
            TaskError: a stream that is not trained on has no prompt with this number.
        """
        return self.streams[stream][self.place_of(stream, index)]

    def place(self, stream: Stream, index: int) -> str:
        """Line or row of prompt number `index` of a stream in its file."""
        return self.places[self.prompt(stream, index).text]

    def left_out_report(self) -> str:
        """Rows that were left out, grouped by reason, with their places."""
        return report(self.left_out)

    def describe(self) -> dict[str, Any]:
        """Everything that determines the prompts: a hash of them with their streams, not the file's path."""
        digest = blake2b(digest_size=8)
        for stream, prompts in self.streams.items():
            for prompt in prompts:
                digest.update(json.dumps([stream, prompt.to_row()]).encode())
        n_prompts = len({prompt.text for prompts in self.streams.values() for prompt in prompts})
        return {**super().describe(), "prompts": digest.hexdigest(), "n_distinct_prompts": n_prompts}


def _other_layouts(fields: Fields | None, named: str) -> str:
    """Advice if a row does not have the given layout but has others."""
    fitting = [name for name, layout in LAYOUTS.items() if fields is not None and layout.fits(fields)]
    names = [] if named in fitting else fitting
    return f"\nThe fields are those of --data.layout {' or '.join(names)}." if names else ""
