"""Windows of text: their tokens, answers and borders, their streams, and what is refused."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from oa_train.batches import Batch
from oa_train.cli.main import main
from oa_train.engine.forward import scored_logits
from oa_train.errors import ArtefactError, ConfigurationError, OaTrainError, TaskError
from oa_train.metrics.measures import measured
from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec
from oa_train.seeds import python_generator
from oa_train.tasks import Text
from oa_train.tasks.corpus import MANY_DOCUMENTS
from oa_train.tasks.documents import DocumentReader
from oa_train.tasks.file_formats import MOST_CHARACTERS
from oa_train.tasks.task import PaddingSide, Stream, stream_of

WORDS = ["Anna", "gave", "a", "book", "to", "Paul", "and", "went", "the", "park", "with", "Mary", ".", "They", "river"]
CUT: tuple[Stream, ...] = ("train", "validation", "test")

Window = tuple[int, ...]


def writing(n_words: int, seed: int = 0) -> str:
    """Words in random order, which repeat no stretch."""
    draw = python_generator("writing", seed)
    return " ".join(draw.choice(WORDS) for _ in range(n_words))


def documents(*lengths: int) -> list[str]:
    return [writing(length, seed) for seed, length in enumerate(lengths)]


def text_of(lm: LMSpec, texts: list[str], **options: Any) -> Text:
    return Text(lm=lm, documents=texts, **({"context_length": 16, "n_means": 4} | options))


def batches(task: Text, streams: tuple[Stream, ...] = CUT) -> Iterator[Batch]:
    for stream in streams:
        yield from task.batches(stream, task.size(stream) or 0, size=5)


def read_back(batch: Batch) -> Iterator[tuple[Window, dict[int, int]]]:
    """Tokens of each window, and the answer at each of its scored positions, without padding."""
    for row, tokens in enumerate(batch.tokens):
        real = batch.attention_mask[row]
        first = int(real.long().argmax())
        scored = batch.scored[row][batch.weights[row] > 0].tolist()
        answers = batch.answers[row, :, 0].tolist()[: len(scored)]
        yield (
            tuple(tokens[real].tolist()),
            {column - first: answer for column, answer in zip(scored, answers, strict=True)},
        )


def slow_windows(task: Text, texts: list[str]) -> dict[Window, dict[int, int]]:
    """Every window of the texts and the answers at all positions, token by token."""
    windows: dict[Window, dict[int, int]] = {}
    for text in texts:
        rest = list(task.tokenizer(text, add_special_tokens=False)["input_ids"])
        while len(rest) > 1:
            window = [] if task.bos_token_id is None else [task.bos_token_id]
            answers = {}
            while len(window) < task.context_length and len(rest) > 1:
                window.append(rest.pop(0))
                answers[len(window) - 1] = rest[0]
            if len(window) >= task.least_tokens:
                windows[tuple(window)] = answers
    return windows


# Tokens, answers, borders


@pytest.mark.parametrize("side", get_args(PaddingSide))
@pytest.mark.parametrize("kind", ["tiny", "bytes", "digits", "letters"])
def test_all_positions_are_those_of_a_slow_reference(
    kind: str, side: PaddingSide, request: pytest.FixtureRequest
) -> None:
    lm = LMSpec() if kind == "tiny" else request.getfixturevalue(f"{kind}_lm")
    texts = documents(200, 40, 9, 70, 3, 121)
    task = text_of(lm, texts, scored="all", padding_side=side, least_tokens=5)
    assert (task.bos_token_id is None) == (kind == "letters")
    expected = slow_windows(task, texts)
    windows = dict(pair for batch in batches(task) for pair in read_back(batch))
    assert any(len(window) < 16 for window in windows)
    assert windows.items() <= expected.items()
    assert len(expected) - 2 <= len(windows)  # a window in front of another stream may be left out
    assert {len(window) for window in expected} == set(task.windows.lengths.add(kind != "letters").tolist())


def test_a_window_crosses_no_border_and_short_ends_are_left_out(letters_lm: LMSpec) -> None:
    sizes = {"a": 100, "b": 20, "c": 7, "d": 57, "e": 49, "f": 25}
    task = text_of(letters_lm, [letter * size for letter, size in sizes.items()], scored="all")
    lengths: dict[str, list[int]] = {letter: [] for letter in sizes}
    for number in range(len(task.windows)):
        ids = task.windows.ids(number)
        assert len(set(ids)) == 1
        lengths[task.tokenizer.decode(ids[:1])].append(len(ids) - 1)
    # 8 tokens are the least, and the last token of a document is an answer only.
    expected = {"a": [16] * 6, "b": [16], "c": [], "d": [16, 16, 16, 8], "e": [16] * 3, "f": [16, 8]}
    assert lengths == expected
    assert task.remarks[:3] == [
        "16 windows of at most 16 tokens, from 6 documents with 258 tokens.",
        "1 of 6 documents are shorter than 8 tokens and left out (7 tokens).",
        "6 tokens at the ends of documents are left out: fewer than 8 remained.",  # 3 of a, 3 of b
    ]
    assert "blocks of the text, with train first and test last: there are too few documents (5)" in task.remarks[3]


@pytest.mark.parametrize("side", get_args(PaddingSide))
def test_the_last_position_is_scored_by_default(bytes_lm: LMSpec, side: PaddingSide) -> None:
    texts = documents(150, 60)
    task = text_of(bytes_lm, texts, padding_side=side)
    expected = slow_windows(task, texts)
    for batch in batches(task):
        assert batch.scored.shape == batch.weights.shape == (len(batch), 1)
        for window, answers in read_back(batch):
            last = len(window) - 1
            assert answers == {last: expected[window][last]}
            assert bool(batch.protected.sum(dim=1).eq(1).all())


@pytest.mark.parametrize("side", get_args(PaddingSide))
def test_positions_are_drawn_without_replacement_from_the_first_allowed_one_on(
    bytes_lm: LMSpec, side: PaddingSide
) -> None:
    texts = documents(300, 15, 14)
    task = text_of(bytes_lm, texts, scored=6, first_scored=5, least_tokens=8, padding_side=side)
    expected = slow_windows(task, texts)
    drawn: set[int] = set()
    for batch in batches(task):
        assert torch.allclose(batch.weights.sum(dim=1), torch.ones(len(batch)))
        assert torch.equal(batch.scored, batch.scored.sort(dim=1).values)
        for window, answers in read_back(batch):
            assert len(answers) == min(6, len(window) - 5)
            assert answers.items() <= expected[window].items()
            drawn |= set(answers)
    assert drawn == set(range(5, 16))
    other = text_of(bytes_lm, texts, scored=6, first_scored=5, least_tokens=8, padding_side=side, seed=1)
    tests = [[pair for batch in batches(each, ("test",)) for pair in read_back(batch)] for each in (task, other)]
    assert [window for window, _ in tests[0]] == [window for window, _ in tests[1]]
    assert tests[0] != tests[1]


def test_a_batch_depends_on_its_numbers_alone(bytes_lm: LMSpec) -> None:
    texts = documents(400, 90)
    task, again = (text_of(bytes_lm, texts, scored=4, first_scored=3) for _ in range(2))
    size = task.size("train") or 0
    together = list(read_back(task.batch_of("train", range(size - 6, size + 6))))  # over an epoch's end
    alone = [next(read_back(again.batch_of("train", range(n, n + 1)))) for n in reversed(range(size - 6, size + 6))]
    assert together == alone[::-1]
    assert task.batch_of("train", range(3, 5)).example_ids.tolist() == [3, 4]


def test_a_text_that_begins_with_the_bos_gets_no_second_one(digits_lm: LMSpec) -> None:
    texts = documents(200)
    task = text_of(digits_lm, texts)
    marked = text_of(digits_lm, [f"<s>{text}" for text in texts])
    ids = [each.windows.ids(0) for each in (task, marked)]
    assert task.bos_token_id not in ids[1]
    assert len(ids[1]) == len(ids[0])


def test_no_bos_is_put_in_front_where_the_model_is_to_have_none(bytes_lm: LMSpec) -> None:
    task = text_of(LMSpec(bytes_lm.name, bos="none"), documents(200), scored="all")
    batch = task.batch("train", 0, 3)
    assert batch.scored.shape == (3, 16)
    assert not bool(batch.protected.any())


def test_a_prompt_is_its_window_decoded(bytes_lm: LMSpec) -> None:
    task = text_of(bytes_lm, documents(400), scored="all")
    for number in range(4):
        prompt, batch = task.prompt("test", number), task.batch("test", number, 1)
        assert prompt.text == task.tokenizer.decode(batch.tokens[0, 1:])
        assert prompt.answers == (task.tokenizer.decode(batch.answers[0, -1]),)
        assert prompt.text + prompt.answers[0] in writing(400)


def test_measures_are_means_over_positions_without_distractors() -> None:
    task = text_of(LMSpec(), documents(60, 20), scored="all", least_tokens=4)
    model = load_model(task.lm)
    batch = next(batch for batch in batches(task) if batch.padded)
    logits = scored_logits(model, batch).double()
    likelihood, odds, right = [], [], []
    for window, answers in read_back(batch):
        row = model(torch.tensor([window])).logits[0].double().log_softmax(dim=-1)
        chosen = [row[place, answer] for place, answer in answers.items()]
        likelihood.append(-sum(map(float, chosen)) / len(chosen))
        odds.append(sum(float(value - torch.log1p(-value.exp())) for value in chosen) / len(chosen))
        right.append(sum(float(row[place].argmax() == answer) for place, answer in answers.items()) / len(answers))
    for name, expected in {"cross_entropy": likelihood, "logit_difference": odds, "accuracy": right}.items():
        assert measured(name, logits, logits, batch).tolist() == pytest.approx(expected, abs=1e-5), name


# Streams


def covered(task: Text, stream: Stream) -> set[int]:
    """Tokens of the corpus that a stream's windows and answers are made of."""
    tokens: set[int] = set()
    for number in task.streams[stream]:
        start = int(task.windows.starts[number])
        tokens |= set(range(start, start + int(task.windows.lengths[number]) + 1))
    return tokens


@pytest.mark.parametrize("lengths", [(2000,), (100,) * 30, (700, 20, 20, 400)])
def test_blocks_of_few_documents_share_no_token(letters_lm: LMSpec, lengths: tuple[int, ...]) -> None:
    task = text_of(letters_lm, documents(*lengths))
    train, validation, test = (covered(task, stream) for stream in CUT)
    assert max(train) < min(validation)
    assert max(validation) < min(test)
    n_windows = len(task.windows)
    sizes = [task.size(stream) or 0 for stream in CUT]
    assert sum(sizes) >= n_windows - 2
    assert [size / n_windows for size in sizes] == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    assert task.streams["refit"] is task.streams["means"] is task.streams["train"]
    # In hash order.
    assert task.streams["test"] != sorted(task.streams["test"])


def test_many_documents_are_hashed_whole_whatever_the_seed(letters_lm: LMSpec) -> None:
    texts = documents(*[12] * MANY_DOCUMENTS)
    for seed in (0, 1):
        task = text_of(letters_lm, texts, seed=seed)
        for stream in get_args(Stream):
            for number in task.streams[stream]:
                section = int(task.windows.sections[number])
                assert stream_of(texts[section]) == stream
        assert sum(task.size(stream) or 0 for stream in get_args(Stream)) == len(task.windows)
    assert not any("blocks" in remark for remark in task.remarks)
    few = text_of(letters_lm, texts[1:])
    assert any("blocks" in remark for remark in few.remarks)


def test_a_document_that_comes_again_is_used_once(letters_lm: LMSpec) -> None:
    texts = documents(80, 90, 100)
    task = text_of(letters_lm, [*texts, texts[0], " \n"])
    assert "1 document left out: repetitions of earlier ones." in task.remarks
    assert "1 document left out: no text." in task.remarks
    assert task.describe()["windows"] == text_of(letters_lm, texts).describe()["windows"]


def test_training_repeats_windows_in_another_order_and_evaluation_repeats_none(letters_lm: LMSpec) -> None:
    task = text_of(letters_lm, documents(200), n_test=500, n_validation=30)
    size = task.size("train") or 0
    epochs = [[task.window("train", number) for number in range(first, first + size)] for first in (0, size)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(task.streams["train"])
    n_test = task.size("test") or 0
    assert task.n_test == n_test < 100
    assert f"n_test is {n_test}, all that there are: the intervals of test metrics are wide." in task.remarks
    with pytest.raises(TaskError, match=rf"{n_test} prompts in the stream 'test', none {n_test}"):
        task.batch_of("test", range(n_test, n_test + 1))


# Sources


def split_rows() -> list[dict[str, str]]:
    splits = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    return [{"text": text, "split": split} for text, split in zip(documents(*[40] * 8), splits, strict=True)]


def test_sources_of_all_kinds_give_the_same_windows(letters_lm: LMSpec, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = split_rows()
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text(
        "split,text\n" + "".join(f'{row["split"]},"{row["text"]}"\n' for row in rows), newline=""
    )
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    parts = {split: [{"text": row["text"]} for row in rows if row["split"] == split] for split in CUT}
    saved = {split: datasets.Dataset.from_list(part) for split, part in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    for number, row in enumerate(rows):
        file = tmp_path / "folder" / row["split"] / f"deeper/{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(row["text"])
    named = [tmp_path / name for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved", "folder")]
    tasks = [Text(lm=letters_lm, path=str(path), context_length=16, n_means=4) for path in named]
    texts = [sorted(task.prompt("test", number).text for number in range(task.n_test)) for task in tasks]
    assert all(text == texts[0] for text in texts)
    # A folder and the splits of a dataset have another order of documents.
    assert len({task.describe()["windows"] for task in tasks[:4]}) == 1
    for task in tasks:
        test = [row["text"] for row in rows if row["split"] == "test"]
        assert all(any(prompt in text for text in test) for prompt in texts[0])
        assert not any("blocks" in remark for remark in task.remarks)
    assert tasks[0].place("test", 0).startswith("line ")
    assert tasks[5].place("test", 0).startswith("test/deeper/")


@pytest.mark.parametrize("separator", ["\n\n\n", "\\n\\n\\n", "<|endoftext|>"])
def test_a_plain_file_is_one_document_or_cut_at_the_separator(
    letters_lm: LMSpec, tmp_path: Path, separator: str
) -> None:
    texts = documents(100, 50, 70)
    path = tmp_path / "book.txt"
    path.write_bytes(separator.replace("\\n", "\n").join(texts).replace("\n", "\r\n").encode())
    options: dict[str, Any] = {"lm": letters_lm, "context_length": 16, "path": str(path), "n_means": 4}
    cut, whole = Text(**options, separator=separator), Text(**options)
    assert cut.describe()["windows"] == text_of(letters_lm, texts).describe()["windows"]
    assert len(whole.windows.corpus.sections) == 1
    assert not any("\r" in whole.prompt("train", number).text for number in range(10))
    assert cut.place("test", 0).startswith("document 3, tokens ")


def test_only_files_of_the_pattern_are_read(letters_lm: LMSpec, tmp_path: Path) -> None:
    for name, text in zip(("a.txt", "b.md", "c.jsonl"), documents(200, 300, 0), strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in split_rows()))
    counts = {}
    for pattern in ("**/*.txt", "*.md", "*.jsonl"):
        task = Text(lm=letters_lm, path=str(tmp_path), pattern=pattern, context_length=16, n_means=4)
        counts[pattern] = len(task.windows.corpus.tokens)
    assert counts["**/*.txt"] == len(writing(200, 0))
    assert counts["*.md"] == len(writing(300, 1))
    assert counts["*.jsonl"] == sum(len(row["text"]) for row in split_rows())


def test_most_tokens_are_those_of_each_split_of_a_dataset(letters_lm: LMSpec, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = {split: datasets.Dataset.from_list([{"text": writing(500, n)}] * 2) for n, split in enumerate(CUT)}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    options: dict[str, Any] = {"lm": letters_lm, "context_length": 16, "n_means": 4, "max_tokens": 100}
    task = Text(path=str(tmp_path / "saved"), **options)
    assert [task.size(stream) for stream in CUT] == [6, 6, 6]
    assert any("Only the first 100 tokens are read" in remark for remark in task.remarks)
    whole = text_of(letters_lm, [writing(500)[:300]], max_tokens=300)
    assert not any("Only the first" in remark for remark in whole.remarks)


def test_a_book_may_be_one_row(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": "word " * (MOST_CHARACTERS // 4)}))
    parts = DocumentReader(str(path), "text", "*", None, None).read()
    assert [len(document.text) for part in parts for document in part] == [5 * (MOST_CHARACTERS // 4)]


def test_the_description_tells_texts_and_options_apart_and_paths_not(letters_lm: LMSpec, tmp_path: Path) -> None:
    texts = [writing(200)[: 16 * 20 + 6], writing(100, 1)]  # 5 tokens are left of the first
    (tmp_path / "a.txt").write_text("@@".join(texts))
    (tmp_path / "b.txt").write_text("@@".join(texts))
    read = [
        Text(lm=letters_lm, path=str(tmp_path / name), separator="@@", context_length=16, n_means=4).describe()
        for name in ("a.txt", "b.txt")
    ]
    first = text_of(letters_lm, texts).describe()
    assert read == [first, first]
    changed = [
        text_of(letters_lm, [texts[0], texts[1].replace("Mary", "Marx")]),
        text_of(letters_lm, texts, context_length=17),
        text_of(letters_lm, texts, least_tokens=3),
        text_of(letters_lm, texts, scored="all"),
        text_of(letters_lm, texts, scored=2, first_scored=3),
        text_of(letters_lm, texts, scored=2, first_scored=4),
    ]
    described = [json.dumps(description) for description in (first, *(task.describe() for task in changed))]
    assert len(set(described)) == len(described)


# Refusals


def refusal(error: type[OaTrainError], **options: Any) -> str:
    with pytest.raises(error) as caught:
        Text(**options)
    return str(caught.value)


def test_windows_are_not_saved_as_prompts(letters_lm: LMSpec, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be saved as prompts"):
        text_of(letters_lm, documents(200)).save(tmp_path / "saved.jsonl", "test", 4)
    assert not (tmp_path / "saved.jsonl").exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"context_length": 1}, "context_length is 1; expected at least 2"),
        ({"context_length": 2000}, "context_length is 2000, and the model has 1024 positions"),
        ({"least_tokens": 17}, "least_tokens is 17; expected at most 16"),
        ({"scored": "some"}, "scored is 'some'; expected last, all, or a number"),
        ({"scored": 0}, "scored is 0; expected last, all, or a number"),
        ({"scored": True}, "scored is True; expected last, all, or a number"),
        ({"scored": 12, "first_scored": 5}, "scored is 12, and a window of 16 tokens has 11 positions from"),
        ({"scored": 2, "first_scored": 8}, "first_scored is 8; expected 0 to 7"),
        ({"answer_positions": "every"}, "say data.scored all"),
        ({"separator": ""}, "separator is empty"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"path": "a.txt"}, "Give data.path, a corpus, or data.documents, but not both"),
    ],
)
def test_options_that_cannot_work_are_refused(letters_lm: LMSpec, options: dict[str, Any], expected: str) -> None:
    given = {"documents": documents(200), "context_length": 16} | options
    assert expected in refusal(ConfigurationError, lm=letters_lm, **given)


def test_texts_that_are_too_short_are_refused(letters_lm: LMSpec) -> None:
    options = {"lm": letters_lm, "context_length": 16}
    assert "data.documents is empty" in refusal(TaskError, documents=[" "], **options)
    said = refusal(TaskError, documents=["x" * 8, "y" * 5], **options)
    assert "shorter than the context: the longest of its 2 documents has 8 tokens" in said
    said = refusal(TaskError, documents=["x" * 110], **options)
    assert "gives too few windows: 2 for train, 1 for validation, 2 for test; expected at least 1, 2, 2." in said
    assert "lower data.context_length than 16" in said
    Text(documents=[writing(60)[:209]], **options)


def rows_of(*texts: str, field: str = "text", **others: str) -> str:
    return "".join(f"{json.dumps({field: text, **others})}\n" for text in texts)


GOOD = "\n".join(documents(30, 30))
BAD: dict[str, tuple[bytes | None, list[str], list[str]]] = {
    "missing.txt": (None, [], ["no such file", "Did you mean mising.txt?"]),
    "empty.txt": (b"", [], ["empty.txt is empty: no document of it has any text"]),
    "blank.jsonl": (rows_of("", " ").encode(), [], ["blank.jsonl is empty"]),
    "no_rows.jsonl": (b"", [], ["no_rows.jsonl is empty"]),
    "field.jsonl": (
        rows_of("a", "b", field="texts").encode(),
        [],
        ["no row has the field 'text'", "Did you mean texts?", "data.field"],
    ),
    "type.jsonl": (
        b'{"text": "a"}\n{"text": [1, 2]}\n',
        [],
        ["type.jsonl, line 2: `text` is not text: [1, 2], a list"],
    ),
    "split.jsonl": (
        rows_of(GOOD, split="trian").encode(),
        [],
        ["line 1", "unknown split 'trian'", "Did you mean tra"],
    ),
    "half.jsonl": (
        (rows_of(GOOD, split="train") + rows_of(writing(40))).encode(),
        [],
        ["line 2: no `split`, and 1 of 2"],
    ),
    "json.jsonl": (b'{"text": "a"}\n{"text": ', [], ["json.jsonl, line 2: not JSON"]),
    "latin.txt": (b"good\nna\xefve\n", [], ["latin.txt, line 2: byte 0xef is not UTF-8", "iconv"]),
    "binary.txt": (b"good\nELF\0\0\1\n", [], ["binary.txt, line 2: a NUL byte, so the file is binary"]),
    "late.txt": (b"good\n" * 2000 + b"\0", [], ["late.txt, line 2001: a NUL byte"]),
    "packed.gz": (gzip.compress(GOOD.encode()), [], ["packed.gz, line ", "a NUL byte, so the file is binary"]),
    "utf16.txt": ("text".encode("utf-16"), [], ["UTF-16; expected UTF-8"]),
    "short.txt": (
        b"Then Anna went",
        [],
        ["short.txt is shorter than the context: its document has 3 tokens", "Lower"],
    ),
    "few.txt": (writing(90).encode(), [], ["too few windows: 0 for train", "data.context_length"]),
    "long.txt": (GOOD.encode(), ["--data.context_length", "49"], ["context_length is 49, and the model has 48 posi"]),
    "many.txt": (GOOD.encode(), ["--data.scored", "40"], ["scored is 40, and a window of 32 tokens has 24 positions"]),
    "wrong.txt": (
        GOOD.encode(),
        ["--data.scored", "every"],
        ["scored is 'every'; expected an integer or one of last, all"],
    ),
    "separated.jsonl": (rows_of(GOOD).encode(), ["--data.separator", "@"], ["every row is a document"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_told_with_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, options, expected = BAD[name]
    Path("mising.txt" if content is None else name).write_bytes(content or b"")
    words = ["check-data", "--data", "Text", "--data.path", name, "--data.context_length", "32", *options]
    assert main([*words, "--run_model", "false"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("oa-train: error: ")
    assert "Traceback" not in said
    assert len(said) < 1500
    for words_expected in expected:
        assert words_expected in said, said


def test_a_folder_without_such_files_is_told_with_those_that_it_has(letters_lm: LMSpec, tmp_path: Path) -> None:
    (tmp_path / "a.rst").write_text("text")
    said = refusal(ConfigurationError, lm=letters_lm, path=str(tmp_path))
    assert "matches data.pattern '**/*.txt'" in said
    assert "1 .rst" in said
    assert "data.pattern is '/x'" in refusal(ConfigurationError, lm=letters_lm, path=str(tmp_path), pattern="/x")


def test_a_dataset_that_cannot_be_reached_is_told(letters_lm: LMSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oa_train.tasks.file_formats.hub_answers", lambda: False)
    said = refusal(ArtefactError, lm=letters_lm, path="hf://nobody/nothing")
    assert "The dataset 'hf://nobody/nothing' cannot be read" in said


# Through the command line


@pytest.mark.parametrize("scored", ["last", "all", "3"])
def test_check_data_shows_windows(
    scored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(writing(600))
    words = ["--data.path", "book.txt", "--data.context_length", "32", "--data.scored", scored, "--n_prompts", "4"]
    assert main(["check-data", "--data", "Text", *words]) == 0
    said = capsys.readouterr().out
    assert "train 0, tokens " in said
    assert "[<bos>]|" in said
    assert "no answer" not in said
    assert "cannot do this task" not in said
    n_scored = {"last": 1, "all": 1, "3": 3}[scored]
    assert said.count("  scored  ") == 4 * n_scored
    assert ("all 31 positions, each by the token that follows" in said) == (scored == "all")
    shown = [line.split("|") for line in said.splitlines() if line.startswith("  tokens")]
    marked = [[piece for piece in row if piece.endswith(">") and piece != "<unk>"] for row in shown]
    assert [len(row) for row in marked] == [{"last": 1, "all": 31, "3": 3}[scored]] * 4
