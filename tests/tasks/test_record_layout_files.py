"""A file in each layout that other packages write, read to prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oa_train.errors import ArtefactError
from oa_train.models.hub import hub_answers
from oa_train.models.spec import LMSpec
from oa_train.tasks import Prompt, Records

Row = dict[str, Any]

# Twenty names of one length, so that counterfactuals under a tokenizer of letters are as long as their prompts.
NAMES = tuple(f"{first}{second}n" for first in "BDKLM" for second in "aeio")


def year_rows(last: str) -> Callable[[str, str], Row]:
    return lambda name, other: {
        "clean": f"The war of {name} lasted from the year 1732 to the year 17",
        "corrupted": f"The war of {name} lasted from the year 1701 to the year 17",
        last: 32,
    }


# Of each layout: a row made of two names, and the prompt that it should be read to. Answers are scored by their first
# letter that differs, and one that follows a word has the space, which is a token of this tokenizer, in the prompt.
ROWS: dict[str, Callable[[str, str], Row]] = {
    "own": lambda name, other: {
        "prompt": f"To {name}",
        "answer": "yes",
        "wrong_answer": "no",
        "counterfactual": f"To {other}",
        "spans": {"who": name},
    },
    "mib_ioi": lambda name, other: {
        "prompt": f"{name} and Zoe met. Zoe called",
        "metadata": {"indirect_object": name, "subject": "Zoe", "random_c": other},
        "s2_io_flip_counterfactual": {"prompt": f"{name} and Zoe met. {name} called"},
    },
    "mib_choices": lambda name, other: {
        "prompt": f"{name} is red. A: red. B: blue. Answer:",
        "choices": {"label": ["A", "B"], "text": ["red", "blue"]},
        "answerKey": 0,
        "symbol_counterfactual": {"prompt": f"{name} is red. X: red. Y: blue. Answer:", "choices": {}, "answerKey": 0},
    },
    "mib_arithmetic": lambda name, other: {
        "prompt": f"{name}: 2 + 3 =",
        "label": "5",
        "operator": "+",
        "random_counterfactual": {"prompt": f"{name}: 2 + 5 =", "label": "7"},
    },
    "mib_greater_than": year_rows("year"),
    "eap_ig_greater_than": year_rows("label"),
    "eap_ig_ioi": lambda name, other: {
        "clean": f"{name} A B. B to",
        "corrupted": f"{name} A C. B to",
        "corrupted_hard": f"{name} C A. B to",
        "correct_idx": 32,  # the letters A and B among the sorted bytes
        "incorrect_idx": 33,
    },
    "auto_circuit": lambda name, other: {
        "clean": f"To {name}",
        "corrupt": f"To {other}",
        "answers": [" yes"],
        "wrong_answers": [" no"],
    },
    "edge_pruning": lambda name, other: {
        "clean": f"{name} 1 + 2 = <predict>3</predict>",
        "corrupted": f"{name} 4 + 2 = <predict>6</predict>",
    },
    "counterfact": lambda name, other: {
        "case_id": 1,
        "requested_rewrite": {
            "prompt": "{} was born in",
            "relation_id": "P19",
            "subject": name,
            "target_new": {"str": "Rome", "id": "Q1"},
            "target_true": {"str": "Paris", "id": "Q2"},
        },
        "paraphrase_prompts": ["x"],
        "neighborhood_prompts": ["y"],
    },
    "known_1000": lambda name, other: {
        "known_id": 1,
        "subject": name,
        "attribute": "Paris",
        "template": "{} was born in",
        "prompt": f"{name} was born in",
        "prediction": " Paris",
        "relation_id": "P19",
    },
    "sva": lambda name, other: {
        "clean_prefix": f"{name}: the cat",
        "patch_prefix": f"{name}: the dog",
        "clean_answer": " runs",
        "patch_answer": " eats",
    },
    "circuitkit": lambda name, other: {
        "prompt": f"To {name}",
        "answer": "yes",
        "corrupted_prompt": f"To {other}",
        "corrupted_answer": "no",
    },
    "blimp": lambda name, other: {
        "sentence_good": f"{name} annoys Tim.",
        "sentence_bad": f"{name} bothers Tim.",
    },
}

# Layouts whose files are tables; all others are JSON.
TABLES = ("eap_ig_ioi", "eap_ig_greater_than")


def tens(start: int, end: int) -> tuple[str, ...]:
    """First digits of the numbers of two digits in a range."""
    return tuple(dict.fromkeys(f"{number:02}"[0] for number in range(start, end)))


EXPECTED: dict[str, Callable[[str, str], Prompt]] = {
    "own": lambda name, other: Prompt(f"To {name} ", ("y",), ("n",), f"To {other} ", spans={"who": name}),
    "mib_ioi": lambda name, other: Prompt(
        f"{name} and Zoe met. Zoe called ", (name[0],), ("Z",), f"{name} and Zoe met. {name} called "
    ),
    "mib_choices": lambda name, other: Prompt(
        f"{name} is red. A: red. B: blue. Answer: ", ("A",), ("B",), f"{name} is red. X: red. Y: blue. Answer: "
    ),
    "mib_arithmetic": lambda name, other: Prompt(f"{name}: 2 + 3 = ", ("5",), ("7",), f"{name}: 2 + 5 = "),
    "eap_ig_ioi": lambda name, other: Prompt(f"{name} A B. B to ", ("A",), ("B",), f"{name} A C. B to "),
    "auto_circuit": lambda name, other: Prompt(f"To {name} ", ("y",), ("n",), f"To {other} "),
    "edge_pruning": lambda name, other: Prompt(f"{name} 1 + 2 = ", ("3",), ("6",), f"{name} 4 + 2 = "),
    "counterfact": lambda name, other: Prompt(f"{name} was born in ", ("P",), ("R",), spans={"subject": (0, 3)}),
    "known_1000": lambda name, other: Prompt(f"{name} was born in ", ("P",), spans={"subject": (0, 3)}),
    "sva": lambda name, other: Prompt(f"{name}: the cat ", ("r",), ("e",), f"{name}: the dog "),
    "circuitkit": lambda name, other: Prompt(f"To {name} ", ("y",), ("n",), f"To {other} "),
    "blimp": lambda name, other: Prompt(f"{name} ", ("a",), ("b",)),
}
# The tens digit is scored; 3 begins numbers on both sides of 32 and counts as neither.
EXPECTED |= dict.fromkeys(
    ("mib_greater_than", "eap_ig_greater_than"),
    lambda name, other: Prompt(
        f"The war of {name} lasted from the year 1732 to the year 17",
        tuple(digit for digit in tens(33, 100) if digit != "3"),
        tuple(digit for digit in tens(0, 33) if digit != "3"),
        f"The war of {name} lasted from the year 1701 to the year 17",
    ),
)


def pairs() -> list[tuple[str, str]]:
    return [(name, NAMES[number - 1]) for number, name in enumerate(NAMES)]


def prompts(task: Records) -> dict[str, Prompt]:
    return {prompt.text: prompt for name in ("train", "validation", "test") for prompt in task.streams[name]}  # type: ignore[index]


@pytest.mark.parametrize("layout", ROWS)
def test_a_file_of_each_layout(layout: str, letters_lm: LMSpec, tmp_path: Path) -> None:
    rows = [ROWS[layout](*pair) for pair in pairs()]
    if layout in TABLES:
        import pandas as pd

        path = tmp_path / "a.csv"  # with an index without a name, as theirs have
        pd.DataFrame(rows).to_csv(path)
    elif layout == "auto_circuit":
        path = tmp_path / "a.json"
        path.write_text(json.dumps({"prompts": rows, "seq_labels": ["x"], "word_idxs": {"y": 1}}))
    else:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    expected = {prompt.text: prompt for prompt in (EXPECTED[layout](*pair) for pair in pairs())}
    assert prompts(Records(path=str(path), layout=layout, lm=letters_lm)) == expected


def table_rows() -> list[Row]:
    splits = ("train", "validation", "test", "test")
    return [
        ROWS["own"](name, other) | {"spans": {"who": [3, 6]}, "split": splits[number % 4]}
        for number, (name, other) in enumerate(pairs())
    ]


def test_parquet_and_a_saved_dataset_read_as_json_lines_do(letters_lm: LMSpec, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    expected = Records(rows=table_rows(), lm=letters_lm).describe()
    whole = datasets.Dataset.from_list(table_rows())
    whole.to_parquet(str(tmp_path / "a.parquet"))
    whole.save_to_disk(str(tmp_path / "whole"))
    parts = {
        split: datasets.Dataset.from_list(
            [{name: value for name, value in row.items() if name != "split"} for row in rows]
        )
        for split in ("train", "validation", "test")
        if (rows := [row for row in table_rows() if row["split"] == split])
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "parts"))  # the splits are the names of its parts
    for name in ("a.parquet", "whole", "parts"):
        assert Records(path=str(tmp_path / name), lm=letters_lm).describe() == expected, name
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    with pytest.raises(ArtefactError, match=r"b\.parquet cannot be read as Parquet"):
        Records(path=str(tmp_path / "b.parquet"), lm=letters_lm)


def test_offline_a_dataset_of_the_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub_answers.cache_clear()
    with pytest.raises(
        ArtefactError, match=r"'hf://nobody/nothing' cannot be read: Couldn't reach .*Offline"
    ) as caught:
        Records(path="hf://nobody/nothing")
    hub_answers.cache_clear()
    assert "a folder that `save_to_disk` wrote is read by its path" in str(caught.value)
