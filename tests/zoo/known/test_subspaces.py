import pytest

from oa_train.zoo.known.subspaces import Subspaces


def test_stretches_follow_each_other_and_the_rest_is_left() -> None:
    spaces = Subspaces(10, first=3, second=4)
    assert dict(spaces) == {"first": slice(0, 3), "second": slice(3, 7), "rest": slice(7, 10)}
    assert len(spaces) == 3
    assert [spaces.size(name) for name in spaces] == [3, 4, 3]
    assert spaces.first("second") == 3


def test_neighbours_have_a_name_together() -> None:
    spaces = Subspaces(10, first=3, second=4)
    spaces.join("both", "first", "second")
    assert spaces["both"] == slice(0, 7)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="11 dimensions do not fit into a space of 10"):
        Subspaces(10, first=5, second=6)
