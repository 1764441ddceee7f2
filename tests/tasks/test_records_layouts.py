"""Rows of other packages' files as prompts."""

from typing import Any

import pytest

from oa_train.tasks.file_formats import RowError
from oa_train.tasks.layouts import LAYOUTS

REWRITE = {"prompt": "{} is in", "subject": "Rome", "target_true": {"str": "Italy"}, "target_new": {"str": "Peru"}}


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        (
            "mib_ioi",
            {"prompt": "p", "metadata": {"indirect_object": "A", "subject": "B"}},
            {"prompt": "p", "answers": "A", "wrong_answers": "B"},
        ),
        (
            "mib_choices",
            {"prompt": "p", "choices": {"label": ["A", "B"]}, "answerKey": 1},
            {"answers": ["B"], "wrong_answers": ["A"]},
        ),
        ("eap_ig_ioi", {"clean": "c", "corrupted": "d", "correct_idx": 5, "incorrect_idx": 6}, {"answer_id": 5}),
        (
            "edge_pruning",
            {"clean": "1 = <predict>3</predict>", "corrupted": "2 = <predict>4</predict>"},
            {"prompt": "1 = ", "answers": ["3"], "wrong_answers": ["4"], "counterfactual": "2 = "},
        ),
        (
            "counterfact",
            {"requested_rewrite": REWRITE},
            {
                "prompt": "Rome is in",
                "answers": ["Italy"],
                "wrong_answers": ["Peru"],
                "spans": {"subject": [0, 4]},
                "group": "Rome",
            },
        ),
        ("known_1000", {"prompt": "In Rome is", "subject": "Rome", "attribute": "x"}, {"spans": {"subject": [3, 7]}}),
        ("circuitkit", {"prompt": "p", "answer": "a", "choices": ["a", "b"]}, {"wrong_answers": ["b"]}),
        (
            "blimp",
            {"sentence_good": "The cats annoy Tim.", "sentence_bad": "The cats annoys Tim."},
            {"prompt": "The cats", "answers": [" annoy Tim."], "wrong_answers": [" annoys Tim."]},
        ),
    ],
)
def test_a_row_of_each_layout(layout: str, row: dict[str, Any], expected: dict[str, Any]) -> None:
    fields = LAYOUTS[layout].read(row)
    assert {name: fields[name] for name in expected} == expected


def test_years_after_the_start_are_answers() -> None:
    fields = LAYOUTS["eap_ig_greater_than"].read({"clean": "c", "corrupted": "d", "label": 97})
    assert fields["answers"] == ["98", "99"]
    assert fields["wrong_answers"][-1] == "97"


def test_a_row_of_another_layout_is_refused() -> None:
    with pytest.raises(RowError, match=r"no value for the field 'metadata\.subject'"):
        LAYOUTS["mib_ioi"].read({"prompt": "p", "metadata": {"indirect_object": "A"}})
