"""Errors say what to do, end a command with the right status, and are the built-in errors that they are."""

import inspect

import pytest

from oa_train import errors
from oa_train.errors import OaTrainError, nearest_names, unknown_name

# Name, built-in error, exit status: 2 for mistakes of the user, 1 for faults while running.
TABLE = [
    ("ConfigurationError", ValueError, 2),
    ("UnknownNameError", KeyError, 2),
    ("ModelError", ValueError, 2),
    ("TaskError", ValueError, 2),
    ("ArtefactError", ValueError, 2),
    ("CheckpointError", ValueError, 2),
    ("NotFiniteError", ArithmeticError, 1),
    ("RunError", RuntimeError, 1),
]


@pytest.mark.parametrize(("name", "builtin", "status"), TABLE)
def test_base_and_exit_status(name, builtin, status):
    kind = getattr(errors, name)
    with pytest.raises(builtin) as caught:
        raise kind("one line\nanother")
    assert isinstance(caught.value, OaTrainError)
    assert caught.value.exit_status == status
    assert str(caught.value) == "one line\nanother"


def test_the_table_names_every_error():
    kinds = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, OaTrainError)}
    assert kinds == {name for name, _, _ in TABLE} | {"OaTrainError"}


def test_an_error_without_message_is_empty():
    assert str(errors.UnknownNameError()) == ""


def test_a_checkpoint_is_an_artefact():
    assert issubclass(errors.CheckpointError, errors.ArtefactError)


def test_near_names_are_suggested_nearest_first():
    assert nearest_names("inducton", ["ioi", "greater_than", "induction"]) == "Did you mean induction?"
    assert nearest_names("abcd", ["abcx", "abxx", "abcde", "zzzz", "abce"]) == "Did you mean abcde, abcx, abce?"


def test_a_name_far_from_all_lists_them_once_each():
    assert nearest_names("qqq", iter(["ioi", "induction", "ioi"])) == "Valid names: ioi, induction."


def test_long_lists_are_cut_at_twenty():
    assert nearest_names("qqq", [f"x{i}" for i in range(20)]).endswith("x18, x19.")
    cut = nearest_names("qqq", [f"x{i}" for i in range(21)])
    assert cut.endswith("x19, ... (21 in all).")
    assert "x20" not in cut


def test_an_unknown_name_is_quoted_and_answered():
    error = unknown_name("component", "a0.h9", ["a0.h0", "m0"])
    assert isinstance(error, KeyError)
    assert str(error) == "There is no component named 'a0.h9'. Did you mean a0.h0?"
