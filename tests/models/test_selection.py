"""Names, order and patterns of components."""

import pytest
import torch

from oa_train.errors import ConfigurationError, UnknownNameError
from oa_train.models.families import Dimensions
from oa_train.models.selection import Components

SMALL = Components(2, 3)
# More than ten layers and heads, where "a1" must not stand for a10 and a11 too.
LARGE = Components(12, 11)


def test_a_layers_heads_and_then_its_mlp():
    assert SMALL.names == ("a0.h0", "a0.h1", "a0.h2", "m0", "a1.h0", "a1.h1", "a1.h2", "m1")
    assert len(SMALL) == 8
    assert len(LARGE.names) == len(LARGE) == 144


def test_the_last_column_is_the_mlps():
    table = torch.arange(len(LARGE)).view(12, 12)
    for layer in range(12):
        assert LARGE.index(f"m{layer}") == table[layer, -1]
        assert LARGE.index(f"a{layer}.h7") == table[layer, 7]


def test_index_names_the_nearest():
    assert [SMALL.index(name) for name in SMALL.names] == list(range(8))
    with pytest.raises(UnknownNameError, match=r"no component named 'a2\.h1'\. Did you mean .*a[01]\.h1"):
        SMALL.index("a2.h1")


def test_sizes_of_a_model():
    assert Components.of(Dimensions(n_layers=2, n_heads=3, d_head=5, d_model=7)) == SMALL


def test_masks_and_names_are_inverse():
    names = ("a0.h1", "m0", "a1.h2")
    mask = SMALL.mask(names)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [False, True, False, True, False, False, True, False]
    assert SMALL.kept(mask) == names
    assert SMALL.mask(("m0", "a1.h2", "a0.h1")).equal(mask)
    assert not SMALL.mask(()).any()
    with pytest.raises(UnknownNameError):
        SMALL.mask(("a0.h1", "nothing"))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["a0.h1"], ("a0.h1",)),
        (["m*"], ("m0", "m1")),
        (["a*.h[12]"], ("a0.h1", "a0.h2", "a1.h1", "a1.h2")),
        (["a1"], ("a1.h0", "a1.h1", "a1.h2")),
        (["m1", "a0.h2"], ("a0.h2", "m1")),
        (["a0", "!a0.h1"], ("a0.h0", "a0.h2")),
        (["a0", "!a0.h1", "a*.h1"], ("a0.h0", "a0.h1", "a0.h2", "a1.h1")),
        (["*", "!*"], ()),
        ([], ()),
    ],
)
def test_patterns(patterns, expected):
    assert SMALL.select(patterns) == expected


def test_a_layer_is_not_a_prefix():
    assert LARGE.select(["a1"]) == tuple(f"a1.h{head}" for head in range(11))
    assert LARGE.select(["a1.h1"]) == ("a1.h1",)
    assert LARGE.select(["m1"]) == ("m1",)


@pytest.mark.parametrize("pattern", ["a9", "!a9", "M0", "h1", "a0.h10"])
def test_a_pattern_without_match_is_refused(pattern):
    with pytest.raises(ConfigurationError, match=f"The pattern '{pattern}' matches no component"):
        SMALL.select(["a0", pattern])
