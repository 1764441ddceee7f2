"""Files of prompts that cannot be used, through the commands: told before any training, and nothing is left behind."""

import codecs
import json
from itertools import permutations
from pathlib import Path

import pytest

from oa_train.cli.main import main
from oa_train.tasks.records import Records

NAMES = ("Anna", "Paul", "Tom", "Mary", "Peter")
TRAIN = ["--model", "CircuitModule", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
COMMANDS = {"check-data": ["check-data"], "fit": ["fit", *TRAIN]}


def row(first: str, second: str, **changes: object) -> dict[str, object]:
    text = "Then, {} and {} went to the park. {} gave a book to"
    fields = {"prompt": text.format(first, second, first), "answer": second, "wrong_answer": first}
    fields["counterfactual"] = text.format(first, second, second)
    return {name: value for name, value in (fields | changes).items() if value is not None}


ROWS = [row(first, second) for first, second in permutations(NAMES, 2)]
GOOD = "".join(f"{json.dumps(content)}\n" for content in ROWS)


def with_a_last(**changes: object) -> bytes:
    return (
        GOOD + json.dumps(row("Anna", "Lucy", prompt="Then, Anna met Lucy. Anna gave a pen to") | changes)
    ).encode()


def without(name: str) -> bytes:
    """The rows, of which the third lacks a field."""
    lines = GOOD.splitlines()
    lines[2] = json.dumps({key: value for key, value in ROWS[2].items() if key != name})
    return "\n".join(lines).encode()


SAME = ROWS[0]["prompt"]
IN_TWO = "".join(f"{json.dumps({**ROWS[0], 'split': split})}\n" for split in ("train", "test"))

BAD = {
    "missing_field": (without("answer"), ["line 3", "'answer'", "leave them out with --data.bad_rows leave_out.\n"]),
    "missing_counterfactual": (
        without("counterfactual"),
        ["line 3", "`counterfactual` is not as in other rows", "Fix"],
    ),
    "unknown_field": (with_a_last(answr="Lucy"), ["line 21", "unknown field 'answr'", "--data.ignored_fields"]),
    "clean_is_counterfactual": (
        with_a_last(prompt=SAME, counterfactual=SAME),
        ["line 21", "the counterfactual is the prompt itself", "Fix"],
    ),
    "other_length": (
        with_a_last(counterfactual="Then, Anna met Lucy. Anna gave a pen and a book to"),
        ["line 21", "the counterfactual has another number of tokens than its prompt", "tokens in", "Fix"],
    ),
    "empty": (b"", ["prompts.jsonl has no rows. Expected one for each prompt, with the fields `prompt`"]),
    "blank_lines": (
        b"\n \n\r\n",
        ["prompts.jsonl has no rows. Expected one for each prompt, with the fields `prompt`"],
    ),
    "long_line": (
        GOOD.encode() + b'{"prompt": "' + b"x" * 10_000_000 + b'"}',
        ["line 21", "longer than 1,000,000 characters", "10,000,014 characters", "Fix"],
    ),
    "two_splits": (
        GOOD.encode() + IN_TWO.encode(),
        ["line 21", "the same prompt in two splits", "train here and none in line 1", "Fix"],
    ),
    "no_continuation": (
        with_a_last(answer="ly", prompt="Then, Anna was real"),
        ["line 21", "an answer with a word that this tokenizer does not know", "Fix"],
    ),
    "utf_16": (GOOD.encode("utf-16"), ["UTF-16; expected UTF-8. Save it as UTF-8"]),
    "latin_1": (with_a_last() + b"\n\xe9", ["line 22", "0xe9 is not UTF-8", "iconv -f latin1"]),
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for loader in ("cli.check_data.load_on_device", "training.module.load_model"):
        monkeypatch.setattr(f"oa_train.{loader}", lambda *_: pytest.fail("a model was loaded"))


def refused(capsys: pytest.CaptureFixture, command: str, path: str) -> str:
    assert main([*COMMANDS[command], "--data", "Records", "--data.path", path]) == 2
    said = capsys.readouterr().err
    assert said.startswith("oa-train: error: ")
    assert "Traceback" not in said
    assert len(said) < 3000
    assert [file.name for file in Path().iterdir() if file.name != "prompts.jsonl"] == []
    return said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BAD)
def test_bad_prompts_are_told_by_line_and_field_with_what_to_do(capsys, name, command):
    content, expected = BAD[name]
    Path("prompts.jsonl").write_bytes(content)
    said = refused(capsys, command, "prompts.jsonl")
    for words in ["prompts.jsonl", *expected]:
        assert words in said, said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dataset_that_cannot_be_reached_is_told(capsys, monkeypatch, command):
    monkeypatch.setattr("oa_train.tasks.file_formats.hub_answers", lambda: False)
    said = refused(capsys, command, "hf://nobody/nothing")
    assert "The dataset 'hf://nobody/nothing' cannot be read" in said
    assert "Check its name and the connection; offline, a dataset that has been downloaded" in said


@pytest.mark.parametrize(
    "content",
    [codecs.BOM_UTF8 + GOOD.encode(), GOOD.replace("\n", "\r\n").encode(), GOOD.rstrip().encode()],
    ids=["bom", "crlf", "no_last_break"],
)
def test_a_byte_order_mark_and_other_line_ends_change_no_prompt(content):
    Path("plain.jsonl").write_bytes(GOOD.encode())
    Path("other.jsonl").write_bytes(content)
    assert Records(path="other.jsonl").describe() == Records(path="plain.jsonl").describe()
    table = ["prompt,answer", *(f'"{content["prompt"]}",{content["answer"]}' for content in ROWS), ""]
    Path("plain.csv").write_bytes("\n".join(table).encode())
    Path("other.csv").write_bytes(codecs.BOM_UTF8 + "\r\n".join(table).encode())
    assert Records(path="other.csv").describe() == Records(path="plain.csv").describe()
