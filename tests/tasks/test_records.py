"""Prompts from files: their reading, their streams, their answers, and what is refused."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from oa_train.errors import ArtefactError, ConfigurationError, OaTrainError, TaskError, UnknownNameError
from oa_train.models.spec import LMSpec
from oa_train.tasks import IOI, Induction, Prompt, Records
from oa_train.tasks.file_formats import MOST_CHARACTERS
from oa_train.tasks.partners import Partners

NAMES = ("Anna", "Paul", "Tom", "Mary", "Peter", "Kate", "John", "Ben")
PLACES = ("park", "store", "library", "school", "market", "beach")

Row = dict[str, Any]


def rows(n: int = 24) -> list[Row]:
    """Distinct prompts in words of the built-in tokenizer."""
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b][:n]
    return [
        {"prompt": f"Then, {a} and {b} went to the park. {a} gave a book to", "answer": b, "wrong_answer": a}
        for a, b in pairs
    ]


def written(folder: Path, content: Iterable[Row] | str | bytes, name: str = "prompts.jsonl") -> str:
    path = folder / name
    if not isinstance(content, bytes):
        content = (
            content if isinstance(content, str) else "".join(f"{json.dumps(row)}\n" for row in content)
        ).encode()
    path.write_bytes(content)
    return str(path)


def refusal(error: type[OaTrainError], **options: Any) -> str:
    with pytest.raises(error) as caught:
        Records(**options)
    return str(caught.value)


def all_prompts(task: Records) -> list[Prompt]:
    return [prompt for stream in ("train", "validation", "test") for prompt in task.streams[stream]]


# Reading


def test_answers_continue_their_prompt_with_and_without_a_leading_space() -> None:
    content = [row | {"answer": f" {row['answer']}"} if number % 2 else row for number, row in enumerate(rows())]
    task = Records(rows=content)
    assert {answer[0] for prompt in all_prompts(task) for answer in prompt.answers} == {" "}
    assert "36 answers got a leading space ('Paul' as ' Paul'" in task.remarks[0]  # 12 answers and 24 wrong ones


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("The war lasted from the year 1732 to the year 17", "45", ("17", "45")),  # a number goes on
        ("The war lasted from the year 1732 to the year ", "17", ("year", " 17")),  # the space moves to the answer
    ],
)
def test_where_a_leading_space_belongs(prompt: str, answer: str, expected: tuple[str, str]) -> None:
    content = [{"prompt": prompt.replace("war", noun), "answer": answer} for noun in ("project", "war", "trip")]
    splits = ("train", "validation", "validation", "test", "test")
    content = [row | {"prompt": row["prompt"].replace("32", year)} for row in content for year in ("32", "34")]
    task = Records(rows=[row | {"split": split} for row, split in zip(content, splits, strict=False)])
    found = task.prompt("train", 0)
    assert found.text.endswith(expected[0])
    assert found.answers == (expected[1],)


@pytest.mark.parametrize("kind", ["bom", "crlf", "csv", "tsv", "json", "prompts"])
def test_files_of_each_kind_read_alike(kind: str, tmp_path: Path) -> None:
    expected = Records(rows=rows()).describe()
    lines = "".join(f"{json.dumps(row)}\n" for row in rows())
    comma = "\t" if kind == "tsv" else ","
    table = "\n".join(comma.join(f'"{cell}"' for cell in cells) for cells in [rows()[0], *map(dict.values, rows())])
    name, content = {
        "bom": ("a.jsonl", b"\xef\xbb\xbf" + lines.encode()),
        "crlf": ("a.jsonl", lines.replace("\n", "\r\n").encode()),
        "csv": ("a.csv", table.encode("utf-8-sig")),
        "tsv": ("a.tsv", table.replace("\n", "\r\n").encode()),
        "json": ("a.json", json.dumps(rows()).encode()),
        "prompts": ("a.json", json.dumps({"prompts": rows()}).encode()),
    }[kind]
    assert Records(path=written(tmp_path, content, name)).describe() == expected


def test_cells_of_a_table_are_text(tmp_path: Path) -> None:
    """pandas would take the answers None and NA for missing ones, and 07 for 7."""
    from oa_train.tasks.file_formats import read_rows

    path = written(tmp_path, "prompt,answer\na,None\nb,NA\nc,07\n", "a.csv")
    assert [row.content["answer"] for row in read_rows(path) if isinstance(row.content, dict)] == ["None", "NA", "07"]


def test_saved_prompts_read_back_equal(tmp_path: Path) -> None:
    tasks = [IOI(), Induction(repeated=3, answer_positions="every")]
    for task in tasks:
        lines = ""
        for stream in ("train", "validation", "test"):
            assert task.save(tmp_path / "saved.jsonl", stream, 20) == 20  # type: ignore[arg-type]
            lines += (tmp_path / "saved.jsonl").read_text()
        back = Records(path=written(tmp_path, lines), answer_positions=task.answer_positions)
        for stream in ("train", "validation", "test"):
            expected = {prompt.text: prompt for prompt in (task.prompt(stream, n) for n in range(20))}  # type: ignore[arg-type]
            assert {prompt.text: prompt for prompt in back.streams[stream]} == expected  # type: ignore[index]
        assert not any("leading space" in remark for remark in back.remarks)


def test_the_hash_of_the_rows_identifies_the_data_and_the_path_does_not(tmp_path: Path) -> None:
    first = Records(path=written(tmp_path, rows())).describe()
    assert Records(path=written(tmp_path, reversed(rows()), "b.jsonl")).describe() == first
    changed = [*rows()[:-1], rows()[-1] | {"wrong_answer": "Ben"}]
    assert Records(path=written(tmp_path, changed, "c.jsonl")).describe()["prompts"] != first["prompts"]
    assert str(tmp_path) not in str(first)


# Streams


def test_few_prompts_are_cut_60_20_20_and_shared_by_what_is_trained() -> None:
    task = Records(rows=rows(50))
    assert [task.size(stream) for stream in ("train", "validation", "test")] == [30, 10, 10]  # type: ignore[arg-type]
    assert task.streams["train"] == task.streams["refit"] == task.streams["means"]
    assert len({prompt.text for prompt in all_prompts(task)}) == 50
    assert (task.n_validation, task.n_test, task.n_means) == (10, 10, 30)
    assert "n_test is 10, all that there are: the intervals of test metrics are wide." in task.remarks


def test_many_prompts_go_to_the_ten_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oa_train.tasks.record_streams.MANY", 50)
    task = Records(rows=rows(56))
    texts = {stream: {prompt.text for prompt in prompts} for stream, prompts in task.streams.items()}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 56
    from oa_train.tasks.task import stream_of

    assert all(stream_of(text) == stream for stream, members in texts.items() for text in members)


def test_prompts_of_a_group_stay_together() -> None:
    content = [row | {"group": row["wrong_answer"]} for row in rows(56)]
    task = Records(rows=content)
    subjects = [{prompt.distractors for prompt in task.streams[stream]} for stream in ("train", "validation", "test")]  # type: ignore[index]
    assert sum(map(len, subjects)) == len(set().union(*subjects)) == 8


def test_training_repeats_its_prompts_in_another_order_and_evaluation_repeats_none() -> None:
    task = Records(rows=rows(50), seed=3)
    epochs = [[task.prompt("train", epoch * 30 + n).text for n in range(30)] for epoch in range(3)]
    assert len(set(epochs[0])) == 30
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    fresh = Records(rows=rows(50), seed=3)
    assert fresh.prompt("train", 67).text == epochs[2][7]  # whatever was asked before
    assert [Records(rows=rows(50), seed=4).prompt("train", n).text for n in range(30)] != epochs[0]
    with pytest.raises(TaskError, match="has 10 prompts in the stream 'test', none 10"):
        task.prompt("test", 10)


def test_too_few_prompts_need_a_split() -> None:
    assert "has 19 prompts; expected at least 20" in refusal(TaskError, rows=rows(19))
    splits = ("train", "dev", "dev", "test", "test")
    task = Records(rows=[row | {"split": split} for row, split in zip(rows(5), splits, strict=True)])
    assert [task.size(stream) for stream in ("refit", "validation", "test")] == [1, 2, 2]  # type: ignore[arg-type]


def test_no_prompt_is_its_own_partner() -> None:
    """Training, means and refit share the prompts of a small file."""
    task = Records(rows=rows())
    batch = task.batch("train", 0, 14)
    partners = Partners(task, 0)(batch)
    assert not (partners.tokens == batch.tokens).all(dim=1).any()
    task.streams["means"] = task.streams["means"][:1]
    task.n_means = 1
    with pytest.raises(TaskError, match="Add prompts of this length"):
        Partners(task, 0)(task.batch_of("means", range(1)))


# Answers of several tokens


def test_several_tokens_are_scored_at_the_first_that_differs(letters_lm: LMSpec) -> None:
    """Each token of this tokenizer is a letter: " spoke" and " speak" differ in their fourth."""
    content = [{"prompt": f"word {number}", "answer": "spoke", "wrong_answer": "speak"} for number in range(20)]
    task = Records(rows=content, lm=letters_lm)
    prompt = task.prompt("test", 0)
    assert (prompt.text[-3:], prompt.answers, prompt.distractors) == (" sp", ("o",), ("e",))
    assert any("20 of 20 prompts have answers of several tokens" in remark for remark in task.remarks)


def test_every_token_of_an_answer_can_be_scored(letters_lm: LMSpec) -> None:
    content = [{"prompt": f"word {number}", "answer": "ab", "wrong_answer": "ac"} for number in range(20)]
    task = Records(rows=content, lm=letters_lm, answer_positions="every")
    prompt = task.prompt("test", 0)
    questions = [
        (question.text[-2:], question.answers, question.distractors) for question in (*prompt.earlier, prompt)
    ]
    assert questions == [(f"{prompt.text[-3]} ", ("a",), ()), (" a", ("b",), ("c",))]
    assert task.batch("test", 0, 2).scored.shape == (2, 2)


def test_counterfactuals_are_extended_alike(letters_lm: LMSpec) -> None:
    content = [
        {"prompt": f"word {n:02}", "answer": "spoke", "wrong_answer": "speak", "counterfactual": f"ward {n:02}"}
        for n in range(20)
    ]
    prompt = Records(rows=content, lm=letters_lm).prompt("test", 0)
    assert prompt.counterfactual == prompt.text.replace("word", "ward")


# Refusals


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"answer": None}, "no value for the field 'answer' (or 'answers')"),
        ({"answer": float("nan")}, "no value for the field 'answer' (or 'answers')"),
        ({"prompt": ""}, "no value for the field 'prompt'"),
        ({"answer": {"text": "x"}}, "`answer` is not text"),
        ({"answers": ["Tom"]}, "both `answer` and `answers`"),
        ({"wrong_answr": "Tom"}, "unknown field 'wrong_answr'. Did you mean wrong_answer, wrong_answers?"),
        ({"counterfactual": rows()[0]["prompt"]}, "the counterfactual is the prompt itself"),
        ({"spans": {"place": "desert"}}, "`spans` is not as in other rows"),
        ({"spans": "park"}, "a cell that is not JSON"),
        ({"split": "tset"}, "unknown split 'tset'. Did you mean test?"),
        ({"wrong_answer": rows()[0]["answer"]}, "an answer that is a wrong answer as well"),
        ({"answer": "Xqzzt"}, "an answer with a word that this tokenizer does not know"),
        ({"earlier": [1]}, "an earlier question of the wrong form"),
    ],
)
def test_a_bad_row_is_told_with_line_and_value(change: Row, expected: str, tmp_path: Path) -> None:
    content = [rows()[0] | change, *rows()[1:]]
    message = refusal(TaskError, path=written(tmp_path, content))
    assert f"prompts.jsonl: 1 of 24 rows cannot be used.\n1 row: {expected}" in message
    assert "  line 1: " in message
    assert "--data.bad_rows leave_out" in message


def test_all_bad_rows_are_told_at_once_the_first_ten_of_a_kind(tmp_path: Path) -> None:
    content = [row | {"answer": None} if number < 12 else row for number, row in enumerate(rows())]
    content[20]["counterfactual"] = "Then, Anna went to the park."
    message = refusal(TaskError, path=written(tmp_path, content))
    assert "13 of 24 rows cannot be used" in message
    assert "12 rows: no value for the field 'answer'" in message
    assert "line 10:" in message
    assert "line 11:" not in message
    assert "and 2 more" in message
    assert "line 21: one, and 11 of 12 have none" in message


def test_bad_rows_can_be_left_out_and_are_named(tmp_path: Path) -> None:
    content = [row | {"answer": None} if number < 3 else row for number, row in enumerate(rows())]
    task = Records(path=written(tmp_path, content), bad_rows="leave_out")
    assert len(all_prompts(task)) == 21
    assert "3 of 24 rows are left out." in task.remarks
    assert [place for place, _ in task.left_out] == ["line 1", "line 2", "line 3"]
    assert set(task.places.values()) == {f"line {number}" for number in range(4, 25)}


def test_a_counterfactual_has_the_length_of_its_prompt() -> None:
    content = [row | {"counterfactual": "Then, Tom and Kate went to the park."} for row in rows()]
    message = refusal(TaskError, rows=content)
    assert "24 rows: the counterfactual has another number of tokens than its prompt" in message


def test_a_span_has_to_occur_once() -> None:
    message = refusal(TaskError, rows=[row | {"spans": {"place": "desert"}} for row in rows()])
    assert "24 rows: a span that cannot be used\n  row 1: The span 'place'" in message
    assert "occurs 0 times in it\n  row 2" in message


def test_a_prompt_is_in_one_split_and_has_one_answer() -> None:
    repeated = [{**row, "split": "train"} for row in rows()]
    message = refusal(TaskError, rows=[*repeated, {**repeated[0], "split": "test"}])
    assert "the same prompt in two splits\n  row 25: test here and train in row 1" in message
    message = refusal(TaskError, rows=[*rows(), {**rows()[0], "answer": "Tom"}])
    assert "the same prompt with other answers\n  row 25: [' Tom'] here and [' Paul'] in row 1" in message
    assert any("1 rows repeat" in remark for remark in Records(rows=[*rows(), rows()[0]]).remarks)


@pytest.mark.parametrize(
    ("name", "content", "error", "expected"),
    [
        ("a.jsonl", b"", TaskError, "has no rows"),
        ("a.jsonl", b'{"prompt": "M\xfcnchen"}', ArtefactError, "a.jsonl, line 1: byte 0xfc is not UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), ArtefactError, "is encoded in UTF-16"),
        ("a.jsonl", b'{"prompt": \n[1]\n', TaskError, "1 row: not JSON\n  line 1"),
        ("a.jsonl", b'"%s"' % (b"x" * 10**7), TaskError, "line 1: 10,000,002 characters"),
        ("a.json", b"[1", ArtefactError, "is not JSON"),
        ("a.json", b'{"a": 1}', ArtefactError, "expected an array of objects"),
        ("a.csv", b'prompt,answer\n"a,b\n', ArtefactError, "Is a quotation mark missing?"),
        ("a.csv", b"prompt,answer\na\n", TaskError, "line 2: 1 cells, and the header has 2"),
        ("a.xlsx", b"", ConfigurationError, "'.xlsx' is not a known format"),
    ],
)
def test_a_damaged_file_is_refused(
    name: str, content: bytes, error: type[OaTrainError], expected: str, tmp_path: Path
) -> None:
    message = refusal(error, path=written(tmp_path, content, name))
    assert expected in message
    assert len(message) < 1000
    assert MOST_CHARACTERS < 10**7


def test_options_are_checked(tmp_path: Path) -> None:
    written(tmp_path, rows())
    assert "Did you mean prompts.jsonl?" in refusal(ConfigurationError, path=str(tmp_path / "promts.jsonl"))
    assert "Did you mean mib_ioi?" in refusal(UnknownNameError, rows=rows(), layout="mib_io")
    assert "but not both" in refusal(ConfigurationError)


def test_fields_of_no_use_can_be_ignored() -> None:
    content = [row | {"source": "mine"} for row in rows()]
    assert "--data.ignored_fields" in refusal(TaskError, rows=content)
    assert len(all_prompts(Records(rows=content, ignored_fields=("source",)))) == 24


def test_of_a_long_file_a_fixed_part_is_kept() -> None:
    task = Records(rows=rows(50), max_prompts=30)
    assert len(all_prompts(task)) == 30
    assert task.describe() == Records(rows=rows(50)[::-1], max_prompts=30).describe()
    assert "30 of 50 prompts are used (max_prompts)" in task.remarks[0]
