"""Documents of a corpus: plain text files, and rows of files and datasets that have a text field."""

import codecs
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oa_train.errors import ArtefactError, ConfigurationError, nearest_names
from oa_train.tasks.file_formats import (
    FILE_READERS,
    HUB,
    Row,
    RowError,
    check_file,
    check_subset,
    dataset_splits,
    read_lines,
    read_rows,
    shorten,
)
from oa_train.tasks.record_reading import SPLIT_NAMES, stream_named
from oa_train.tasks.task import Stream

# A row may be a whole book: the longest cell that the CSV parser accepts on every system.
LONGEST = 2**31 - 1

# Number of bytes at the beginning of a file that are examined to see whether it is text.
BEGINNING = 8192

# Number of rows after which a field that none of them has is an error.
ROWS_WITHOUT = 100

# Files one of which identifies a folder saved by `datasets`.
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Document:
    """A text of a corpus.

    Attributes:
        place: its location, for messages ("howto/index.txt", "line 3").
        text: its full text.
        split: its stream, if the corpus names it.
    """

    place: str
    text: str
    split: Stream | None = None


@dataclass(frozen=True)
class DocumentReader:
    """Reads the documents of files, folders and datasets.

    Args:
        path: plain text file, file of rows (a suffix of `FILE_READERS`), folder of such files, folder saved by
            `datasets`, or `hf://owner/name` on the Hub.
        field: field of a row that holds the text.
        pattern: glob pattern of the files in a folder that are read.
        separator: text between the documents of a plain file; without it the file is one document.
        subset: configuration of a Hub dataset.
    """

    path: str
    field: str
    pattern: str
    separator: str | None
    subset: str | None

    def read(self) -> list[Iterator[Document]]:
        """Documents in parts: the splits of a dataset, or one part of everything else.

        Raises:
            ConfigurationError: there is no such file, or no file in the folder matches the pattern.
            ArtefactError: a file cannot be read, or no row has the field; some are raised by the iterators.
        """
        check_subset(self.path, self.subset)
        folder = Path(self.path).expanduser()
        if self.path.startswith(HUB) or any((folder / name).is_file() for name in SAVED):
            self._refuse_separator()
            path = self.path if self.path.startswith(HUB) else str(folder)
            return [self._texts(rows) for rows in dataset_splits(path, self.subset)]
        if folder.is_dir():
            return [self._folder(folder)]
        check_file(folder, self.path, (*FILE_READERS, ".txt", ".md", ".rst"))
        if folder.suffix.lower() in FILE_READERS:
            self._refuse_separator()
        return [self._file(folder)]

    def _refuse_separator(self) -> None:
        if self.separator is not None:
            raise ConfigurationError(
                f"data.separator is {self.separator!r}, and data.path is {self.path!r}, in which every row is a "
                "document. Leave the separator out, or give plain text."
            )

    def _folder(self, folder: Path) -> Iterator[Document]:
        try:
            files = sorted(file.relative_to(folder) for file in folder.glob(self.pattern) if file.is_file())
        except (ValueError, NotImplementedError) as problem:
            raise ConfigurationError(
                f"data.pattern is {self.pattern!r}: {problem}. Expected a pattern such as '**/*.txt'."
            ) from None
        if not files:
            counts = Counter(file.suffix or "no suffix" for file in folder.rglob("*") if file.is_file())
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5)) or "none"
            raise ConfigurationError(
                f"No file in {self.path!r} matches data.pattern {self.pattern!r}. By suffix its files are: {kinds}."
            )
        # Folders train, validation and test are splits if the folder has no other entries.
        splits = [SPLIT_NAMES.get(file.parts[0].lower()) if len(file.parts) > 1 else None for file in files]
        named = all(splits)
        for file, split in zip(files, splits, strict=True):
            for document in self._file(folder / file, f"{file.as_posix()}"):
                yield Document(document.place, document.text, split if named else document.split)

    def _file(self, file: Path, name: str = "") -> Iterator[Document]:
        if file.suffix.lower() in FILE_READERS:
            return self._texts(read_rows(str(file), longest=LONGEST), name)
        return self._plain(file, name)

    def _plain(self, file: Path, name: str) -> Iterator[Document]:
        try:
            text = "".join(_checked_lines(file))
        except OSError as problem:
            raise ArtefactError(f"{file} cannot be read: {problem.strerror}.") from None
        pieces = text.split(self.separator) if self.separator else [text]
        for number, piece in enumerate(pieces, start=1):
            yield Document(", ".join(filter(None, (name, f"document {number}" if len(pieces) > 1 else ""))), piece)

    def _texts(self, rows: Iterator[Row], name: str = "") -> Iterator[Document]:
        fields: dict[str, None] = {}
        n_rows = n_with = 0
        for row in rows:
            n_rows += 1
            place = ", ".join(filter(None, (name, row.place)))
            try:
                if isinstance(row.content, RowError):
                    raise row.content
                fields |= dict.fromkeys(row.content)
                n_with += self.field in row.content
                # Raise before a large dataset is read to its end.
                if not n_with and n_rows == ROWS_WITHOUT:
                    break
                text = row.content.get(self.field) or ""
                if not isinstance(text, str):
                    raise RowError(f"`{self.field}` is not text", f"{shorten(text)}, a {type(text).__name__}")
                yield Document(place, text, stream_named(row.content.get("split")))
            except RowError as problem:
                raise ArtefactError(f"{self.path}, {place}: {problem}.") from None
        if n_rows and not n_with:
            others = [other for other in fields if other != "split"]
            raise ArtefactError(
                f"{self.path}{f', {name}' if name else ''}: no row has the field {self.field!r}. "
                f"{nearest_names(self.field, others)} data.field names the field that holds the text; its fields are "
                f"{', '.join(map(repr, others[:10])) or 'none'}."
            )


def listed_documents(texts: Sequence[str]) -> list[Iterator[Document]]:
    """Texts that are already in memory, as one part."""
    return [(Document(f"document {number}", text) for number, text in enumerate(texts, start=1))]


def _checked_lines(file: Path) -> Iterator[str]:
    """Lines of a text file, each with one character at its end; refuses a file that is not text."""
    with file.open("rb") as content:
        beginning = content.read(BEGINNING)
    if b"\0" in beginning and not beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        # Checked first, lest a byte that is not UTF-8 be taken for one of another encoding.
        raise _binary(file, beginning[: beginning.index(b"\0")].count(b"\n") + 1)
    for number, line in enumerate(read_lines(file), start=1):
        if "\0" in line:
            raise _binary(file, number)
        yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _binary(file: Path, line: int) -> ArtefactError:
    return ArtefactError(f"{file}, line {line}: a NUL byte, so the file is binary; expected text in UTF-8.")
