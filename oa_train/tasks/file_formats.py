"""Rows and lines of files with their line numbers: JSON Lines, JSON, CSV, Parquet and Hub datasets."""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from pathlib import Path
from typing import Any

from oa_train.errors import ArtefactError, ConfigurationError, nearest_names
from oa_train.models.hub import hub_answers

HUB = "hf://"

# A longer line is not a prompt; it is usually a whole JSON file without line breaks.
MOST_CHARACTERS = 1_000_000

# Number of rows that a message lists for each problem; the others are only counted.
MOST_LISTED = 10

Fields = dict[str, Any]


class RowError(ValueError):
    """Reason why a row cannot be used.

    Attributes:
        problem: kind of problem, by which a report groups rows.
        detail: the field and its value.
    """

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(f"{problem}: {detail}")
        self.problem = problem
        self.detail = detail


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        place: its location in the file, for messages ("line 3").
        content: its fields, or the reason why it could not be read.
    """

    place: str
    content: Fields | RowError


def read_rows(path: str, subset: str | None = None, longest: int = MOST_CHARACTERS) -> Iterator[Row]:
    """Rows of a file (its suffix gives the format), a folder saved by `datasets`, or `hf://owner/name` on the Hub.

    Args:
        path: the file, folder or dataset.
        subset: configuration of a Hub dataset.
        longest: longest line of JSON Lines, or cell of a table, that is read, in characters.

    Raises:
        ConfigurationError: there is no such file, or its format is not known.
        ArtefactError: the file does not have the format of its suffix or is not UTF-8, or the dataset cannot be read.
    """
    if path.startswith(HUB):
        return chain.from_iterable(dataset_splits(path, subset))
    check_subset(path, subset)
    file = Path(path).expanduser()
    if file.is_dir():
        return chain.from_iterable(dataset_splits(str(file)))
    check_file(file, path)
    if file.suffix.lower() not in FILE_READERS:
        raise ConfigurationError(
            f"data.path is {path!r}, and {file.suffix or 'no suffix'!r} is not a known format; expected "
            f"{', '.join(FILE_READERS)}, a folder saved by `datasets`, or {HUB}owner/name."
        )
    return FILE_READERS[file.suffix.lower()](file, longest)


def check_subset(path: str, subset: str | None) -> None:
    """Raise a ConfigurationError if a subset is given for something other than a Hub dataset."""
    if subset is not None and not path.startswith(HUB):
        raise ConfigurationError(f"data.subset is for Hub datasets ({HUB}owner/name), and data.path is {path!r}.")


def check_file(file: Path, path: str, suffixes: Iterable[str] | None = None) -> None:
    """Raise a ConfigurationError if a file does not exist; it names the nearest folders and files of these suffixes.

    `path` is the file as its user wrote it; the suffixes are those of `FILE_READERS` by default.
    """
    if not file.is_file():
        known = FILE_READERS if suffixes is None else suffixes
        others = (other for other in file.parent.glob("*") if not other.name.startswith("."))
        names = sorted(other.name for other in others if other.suffix in known or other.is_dir())
        near = f" {nearest_names(file.name, names, f'In {file.parent}')}" if names else ""
        raise ConfigurationError(f"data.path is {path!r}, and there is no such file.{near}")


def shorten(value: object, most: int = 80) -> str:
    """A value as a message shows it: quoted, and shortened in the middle if it is long."""
    text = repr(value[: 2 * most] + value[-most:] if isinstance(value, str) and len(value) > 4 * most else value)
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-(most // 4) :]}"


def shared_length(sequences: Sequence[Sequence[object]]) -> int:
    """Length of the common prefix of all sequences."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: all(element == column[0] for element in column), columns))


def report(problems: Iterable[tuple[str, RowError]]) -> str:
    """Lines that list problems of rows by kind: the count of each kind, and its first ten with their places."""
    ordered = sorted(problems, key=lambda row: row[1].problem)
    lines = []
    for problem, group in groupby(ordered, key=lambda row: row[1].problem):
        rows = list(group)
        lines.append(f"{len(rows)} {'row' if len(rows) == 1 else 'rows'}: {problem}")
        lines += [f"  {place}: {error.detail}" for place, error in rows[:MOST_LISTED]]
        if len(rows) > MOST_LISTED:
            lines.append(f"  and {len(rows) - MOST_LISTED} more")
    return "\n".join(lines)


def read_lines(file: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, with or without a byte order mark.

    Raises:
        ArtefactError: a line is not UTF-8.
    """
    with file.open("rb") as content:
        for number, raw in enumerate(content, start=1):
            if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ArtefactError(f"{file} is encoded in UTF-16; expected UTF-8. Save it as UTF-8.")
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as problem:
                wrong = raw[max(0, problem.start - 20) : problem.end + 10]
                raise ArtefactError(
                    f"{file}, line {number}: byte {raw[problem.start]:#04x} is not UTF-8, in {wrong!r}. Save the file "
                    "as UTF-8 (`iconv -f latin1 -t utf-8` where it is Latin-1)."
                ) from None


def _json(text: str) -> Any:
    """Parse JSON; NaN, which pandas writes for a missing value, becomes None."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except json.JSONDecodeError as problem:
        excerpt = shorten(text[max(0, problem.pos - 20) : problem.pos + 20])
        raise RowError("not JSON", f"{problem.msg} at character {problem.pos + 1}, near {excerpt}") from None
    except RecursionError:
        raise RowError("not JSON", f"nested too deeply: {shorten(text)}") from None


def _json_lines(file: Path, longest: int) -> Iterator[Row]:
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip():
            yield _row(f"line {number}", line, longest)


def _row(place: str, line: str, longest: int) -> Row:
    try:
        if len(line) > longest:
            raise RowError(f"longer than {longest:,} characters", f"{len(line):,} characters, {shorten(line)}")
        content = _json(line)
        if not isinstance(content, dict):
            advice = " (name a JSON array .json)" if line.lstrip().startswith("[") else ""
            raise RowError(f"not a JSON object{advice}", shorten(line.strip()))
    except RowError as problem:
        return Row(place, problem)
    return Row(place, content)


def _json_document(file: Path, longest: int) -> Iterator[Row]:
    """Rows of a JSON array, or of the array `prompts` in a JSON object."""
    try:
        document = _json("".join(read_lines(file)))
    except RowError as problem:
        raise ArtefactError(f"{file} is {problem}. Name a file with one object a line .jsonl.") from None
    rows = document.get("prompts") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise ArtefactError(
            f"{file} holds {shorten(document)}; expected an array of objects, or an object with such an array named "
            "prompts."
        )
    for number, content in enumerate(rows, start=1):
        valid = isinstance(content, dict)
        yield Row(f"row {number}", content if valid else RowError("not a JSON object", shorten(content)))


def _csv(file: Path, longest: int) -> Iterator[Row]:
    # Cells stay strings: pandas would read the answers "None" and "NA" as missing and "007" as 7.
    reader = csv.reader(read_lines(file), delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    csv.field_size_limit(longest)
    names: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            raise ArtefactError(f"{file}, {place}: {problem}. Is a quotation mark missing?") from None
        if not cells:
            continue
        if names is None:
            names = cells
            continue
        if len(cells) != len(names):
            detail = f"{len(cells)} cells, and the header has {len(names)}: {shorten(cells)}"
            yield Row(place, RowError("other than the header's number of cells", detail))
            continue
        yield Row(place, {name: cell for name, cell in zip(names, cells, strict=True) if cell})


def _parquet(file: Path, longest: int) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigurationError(
            f"{file} is a Parquet file, which pyarrow reads: pip install 'oa_train[records]'."
        ) from None
    try:
        batches = parquet.ParquetFile(file).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from (Row(f"row {number}", row) for number, row in enumerate(rows, start=1))
    except (ArrowException, OSError) as problem:
        raise ArtefactError(f"{file} cannot be read as Parquet: {str(problem).splitlines()[0]}") from None


def dataset_splits(path: str, subset: str | None = None) -> list[Iterator[Row]]:
    """Rows of each split of a dataset, streamed from the Hub or saved in a folder; split names are the rows' `split`.

    Raises:
        ConfigurationError: the package `datasets` is missing.
        ArtefactError: the dataset cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigurationError(
            f"{path!r} is a dataset, which `datasets` reads: pip install 'oa_train[records]'."
        ) from None
    with _reading(path):
        if path.startswith(HUB):
            datasets.config.HF_HUB_OFFLINE = not hub_answers()  # it would try again and again
            loaded = datasets.load_dataset(path.removeprefix(HUB), subset, streaming=True)
        else:
            loaded = datasets.load_from_disk(path)
    splits = loaded if isinstance(loaded, Mapping) else {None: loaded}
    return [_split_rows(path, rows, None if len(splits) == 1 else split) for split, rows in splits.items()]


def _split_rows(path: str, rows: Iterable[Fields], split: str | None) -> Iterator[Row]:
    named = {} if split is None else {"split": split}
    with _reading(path):
        for number, row in enumerate(rows, start=1):
            yield Row(f"row {number}" + (f" of {split}" if named else ""), {**named, **row})


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn errors of `datasets` into an ArtefactError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as problem:
        reason = str(problem.args[0] if problem.args else "").partition("\n")[0] or repr(problem)
        raise ArtefactError(
            f"The dataset {path!r} cannot be read: {reason}\n"
            "Check its name and the connection; offline, a dataset that has been downloaded before is read from the "
            "cache, and a folder that `save_to_disk` wrote is read by its path."
        ) from problem


FILE_READERS: dict[str, Callable[[Path, int], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_document,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
