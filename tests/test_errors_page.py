"""The generated pages of the manual are those that the code generates."""

import re
import runpy
from pathlib import Path

from oa_train.errors import EXIT_STATUSES, OaTrainError

ROOT = Path(__file__).parent.parent
PAGE = runpy.run_path(str(ROOT / "docs" / "errors_page.py"))
error_classes, errors_page, write = PAGE["error_classes"], PAGE["errors_page"], PAGE["main"]


def test_the_committed_page_is_what_make_docs_writes(tmp_path):
    write([str(tmp_path)])
    assert (ROOT / "docs" / "errors.md").read_text() == (tmp_path / "errors.md").read_text(), "run `make docs`"


def test_the_page_says_of_every_class_what_to_do():
    sections = errors_page().split("\n### ")[1:]
    assert [section.split("\n")[0] for section in sections] == [kind.__name__ for kind in error_classes()]
    assert OaTrainError in error_classes()
    for section in sections:
        assert "\nWhat to do: " in section
        assert "Attributes:" not in section


def test_the_page_has_every_exit_status():
    page = errors_page()
    for status, meaning in EXIT_STATUSES.items():
        row = next(line for line in page.split("\n") if line.startswith(f"| {status} |"))
        # A cell of a table escapes its bars.
        assert re.split(r"(?<!\\)\|", row)[1:-1] == [f" {status} ", f" {meaning.replace('|', chr(92) + '|')} "]
    assert {kind.exit_status for kind in error_classes()} <= EXIT_STATUSES.keys()
