"""Selections: names and order of their entries, patterns, spans, and what cannot be selected."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from oa_train.errors import ArtefactError, ConfigurationError, UnknownNameError
from oa_train.models.dictionaries import Dictionary, DictionarySpec, save_dictionary
from oa_train.models.parts import Dimensions
from oa_train.models.selection import Nodes
from oa_train.models.sites import SITE_KINDS, Site
from tests.builders import tiny_model


def sizes(n_layers: int, n_heads: int, **more: int) -> Dimensions:
    return Dimensions(n_layers, n_heads, **({"d_head": 4, "d_model": 6, "d_mlp": 3} | more))


SMALL = Nodes(sizes(2, 3))
# More than ten layers and heads, where "a1" must not stand for a10 and a11 too.
LARGE = Nodes(sizes(12, 11))
ALL_KINDS = tuple(name for name in SITE_KINDS if name != "features")
WHOLE = Nodes(sizes(2, 2), ALL_KINDS)
CONFIG = AutoConfig.for_model("gpt2", n_layer=4, n_head=2, n_embd=6, n_inner=20)


def dictionary(site: str = "r1", width: int = 6, n_features: int = 5, **settings) -> Dictionary:
    drawn = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=drawn) for shape in ((width, n_features), (n_features, width))]
    return Dictionary(site, tensors[0], torch.zeros(n_features), tensors[1], torch.zeros(width), "relu", **settings)


def of(*patterns: str, kinds: tuple[str, ...] = ("heads", "mlp"), dictionaries=()) -> Nodes:
    return Nodes.of(CONFIG, kinds, patterns, dictionaries)


# Names and order


def test_a_layers_heads_and_then_its_mlp():
    assert SMALL.names == ("a0.h0", "a0.h1", "a0.h2", "m0", "a1.h0", "a1.h1", "a1.h2", "m1")
    assert len(SMALL) == 8
    assert len(LARGE.names) == len(LARGE) == 144
    assert Nodes(sizes(2, 3), ("mlp", "heads")).names == SMALL.names


def test_the_last_column_is_the_mlps():
    table = torch.arange(len(LARGE)).view(12, 12)
    for layer in range(12):
        assert LARGE.index(f"m{layer}") == table[layer, -1]
        assert LARGE.index(f"a{layer}.h7") == table[layer, 7]


def test_all_kinds_stand_in_the_order_of_a_forward_pass():
    layers = [
        ["a0.h0", "a0.h1", "a0", "m0.n0", "m0.n1", "m0.n2", "m0"],
        ["r1", "a1.h0", "a1.h1", "a1", "m1.n0", "m1.n1", "m1.n2", "m1"],
    ]
    assert WHOLE.names == ("tokens", "input", *layers[0], *layers[1], "r2")
    assert Nodes(sizes(2, 2), ALL_KINDS[::-1]).names == WHOLE.names


def test_the_last_residual_stream_is_that_of_the_final_norm():
    assert Nodes(sizes(12, 2), ("residual",)).names == tuple(f"r{layer}" for layer in range(1, 13))


def test_features_follow_what_their_dictionary_reads():
    kinds = ("residual", "mlp", "features")
    nodes = Nodes(sizes(2, 2), kinds, (), (dictionary("m0", n_features=2), dictionary("r1", n_features=3)))
    assert nodes.names == ("m0", "f0.0", "f0.1", "r1", "f1.0", "f1.1", "f1.2", "m1", "r2")
    assert nodes.sites[Site("features", 1)] == (3, 1)


def test_sites_have_numbers_and_widths_of_units():
    sites = Nodes(sizes(2, 3, d_head=4, d_model=6, d_mlp=5), ALL_KINDS).sites
    assert sites[Site("heads", 1)] == (3, 4)
    assert sites[Site("neurons", 0)] == (5, 1)
    assert {sites[Site(kind, 1)] for kind in ("residual", "attention", "mlp")} == {(1, 6)}
    assert sites[Site("tokens")] == sites[Site("embedding")] == (1, 6)
    assert Site("residual", 0) not in sites


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "gemma2"])
def test_sizes_of_a_model(family):
    config = tiny_model(family).config
    nodes = Nodes.of(config)
    assert nodes == Nodes(Dimensions.of(config))
    assert SMALL.of_model(config) == nodes
    assert Nodes.of(config, ["neurons"]).names[-1] == "m2.n47"
    assert nodes.node_level(config) is nodes


def test_kinds_of_entries():
    kinds, of_entries = WHOLE.entry_kinds
    first = {"t": "tokens", "i": "embedding", "r": "residual"}
    for name, number in zip(WHOLE.names, of_entries.tolist(), strict=True):
        default = {"a": ("attention", "heads"), "m": ("mlp", "neurons")}
        assert kinds[number] == (first.get(name[0]) or default[name[0]]["." in name])


def test_index_names_the_nearest():
    assert [WHOLE.index(name) for name in WHOLE.names] == list(range(len(WHOLE)))
    with pytest.raises(UnknownNameError, match=r"no component named 'a2\.h1'\. Did you mean .*a[01]\.h1"):
        SMALL.index("a2.h1")


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


# Patterns


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


def test_a_layer_is_its_attention_where_that_is_chosen():
    assert WHOLE.select(["a1"]) == ("a1",)
    assert WHOLE.select(["a1.*"]) == ("a1.h0", "a1.h1")
    assert Nodes(sizes(2, 2), ("attention", "mlp")).select(["a*"]) == ("a0", "a1")
    assert Nodes(sizes(2, 2), ("neurons",)).select(["m1"]) == ("m1.n0", "m1.n1", "m1.n2")


def test_patterns_of_neurons_streams_and_features():
    nodes = of(kinds=("neurons", "residual"))
    assert nodes.select(["m1.n1?"]) == tuple(f"m1.n{number}" for number in range(10, 20))
    assert nodes.select(["r[12]", "!r1"]) == ("r2",)
    features = of(kinds=("features", "mlp"), dictionaries=[dictionary("r3")])
    assert features.select(["f3.[13]"]) == ("f3.1", "f3.3")
    assert features.select(["f3"]) == tuple(f"f3.{number}" for number in range(5))


@pytest.mark.parametrize("pattern", ["a9", "!a9", "M0", "h1", "a0.h10"])
def test_a_pattern_without_match_is_refused(pattern):
    with pytest.raises(ConfigurationError, match=f"The pattern '{pattern.strip('!')}' matches no component"):
        SMALL.select(["a0", pattern])


@pytest.mark.parametrize(
    ("kinds", "pattern", "kind"),
    [
        (("heads", "mlp"), "m1.n0", "neurons"),
        (("heads", "mlp"), "m0.n*@-1", "neurons"),
        (("heads", "mlp"), "r1", "residual"),
        (("heads", "mlp"), "tokens", "tokens"),
        (("heads", "mlp"), "input", "embedding"),
        (("mlp",), "a1.h1", "heads"),
        (("heads",), "m*", "mlp"),
        (("heads",), "!m1", "mlp"),
        *((("heads", "mlp"), pattern, "features") for pattern in ("f2.*", "f0", "f*.1?", "!f1.3@-1")),
    ],
)
def test_a_pattern_of_a_kind_that_is_lacking_names_that_kind(kinds, pattern, kind):
    nodes = Nodes(sizes(2, 2), kinds)
    with pytest.raises(
        ConfigurationError, match=rf"kinds {', '.join(kinds)}\..*\n.*of the kind '{kind}', which sites"
    ):
        nodes.select(["*", pattern])


# Spans


def test_units_are_restricted_to_spans_and_the_others_stay_whole():
    nodes = of("m*@S2")
    assert nodes.names[:4] == ("a0.h0", "a0.h1", "m0@S2", "a1.h0")
    assert nodes.select(["m*@S2"]) == nodes.select(["m*"]) == ("m0@S2", "m1@S2", "m2@S2", "m3@S2")
    assert nodes.spans == (None, "S2")
    assert nodes.span_pairs == ()


def test_a_unit_at_several_spans_has_an_entry_for_each():
    nodes = of("m1@S1", "m1@S2", "m2@S2", "a3.h1@-1")
    assert nodes.names == (
        *("a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1@S1", "m1@S2"),
        *("a2.h0", "a2.h1", "m2@S2", "a3.h0", "a3.h1@-1", "m3"),
    )
    assert nodes.span_pairs == (("S1", "S2"),)
    assert nodes.select(["m1"]) == ("m1@S1", "m1@S2")
    assert nodes.select(["*@S2", "!m2"]) == ("m1@S2",)
    assert nodes.select(["a3"]) == ("a3.h0", "a3.h1@-1")
    assert nodes.select(["a3@-1"]) == ("a3.h1@-1",)
    assert nodes.select(["*@S?"]) == ("m1@S1", "m1@S2", "m2@S2")
    assert [nodes.index(name) for name in nodes.names] == list(range(len(nodes)))


def test_entries_of_one_site_and_span_stand_side_by_side():
    nodes = of("a0.h1@x", "a0@y", kinds=("heads",))
    assert nodes.names[:3] == ("a0.h0@y", "a0.h1@y", "a0.h1@x") or nodes.names[:3] == ("a0.h1@x", "a0.h0@y", "a0.h1@y")
    for group in nodes.groups:
        units = range(2) if group.units is None else group.units
        expected = tuple(f"a{group.site.layer}.h{unit}" + (f"@{group.span}" if group.span else "") for unit in units)
        assert nodes.names[group.entries] == expected


def test_streams_and_neurons_at_spans():
    nodes = of("r2@subject_last", "m1.n1?@-1", kinds=("residual", "neurons"))
    assert nodes.select(["*@*"]) == (*(f"m1.n{number}@-1" for number in range(10, 20)), "r2@subject_last")
    assert "m1.n3" in nodes.names
    assert "r1" in nodes.names


@pytest.mark.parametrize(
    ("patterns", "unit"),
    [(["m1", "m*@S2"], "m1"), (["m*@S2", "*"], "m0"), (["a1.h0@-1", "a1"], "a1.h0"), (["a*", "a2@S"], "a2.h0")],
)
def test_a_unit_with_and_without_a_span_is_refused(patterns, unit):
    with pytest.raises(ConfigurationError, match=rf"selects {unit} at every token, .* spans of one unit must not"):
        of(*patterns)


def test_what_is_taken_out_does_not_overlap():
    nodes = of("m*@S2", "!m1")
    assert nodes.select(["m*@S2", "!m1"]) == ("m0@S2", "m2@S2", "m3@S2")


def test_a_span_that_no_entry_has_matches_nothing():
    for pattern in ("m1@S1", "a0@S2", "m*@"):
        with pytest.raises(ConfigurationError, match="matches no component"):
            of("m*@S2").select([pattern])


# What masks mean


def test_ablated_units_by_site_and_span():
    nodes = of("m1@S1", "m1@S2")
    masks = torch.ones(2, len(nodes), dtype=torch.bool)
    masks[0, [nodes.index("a0.h1"), nodes.index("m1@S2")]] = False
    masks[1, nodes.index("m3")] = False
    replaced = nodes.replaced(masks)
    assert nodes.spans == (None, "S1", "S2")
    for site, (n_units, _) in nodes.sites.items():
        expected = torch.zeros(2, 3, n_units, dtype=torch.bool)
        if site == Site("heads", 0):
            expected[0, 0, 1] = True
        if site == Site("mlp", 1):
            expected[0, 2, 0] = True
        if site == Site("mlp", 3):
            expected[1, 0, 0] = True
        assert torch.equal(replaced[site], expected), site


def test_the_map_of_scores_has_a_row_for_each_layer_and_span():
    nodes = of("m1@S1", "m1@S2", "!a0")
    drawn = nodes.score_map(torch.arange(len(nodes)).float())
    assert drawn.columns == ("h0", "h1", "mlp")
    assert drawn.rows == ("0", "1", "1 @S1", "1 @S2", "2", "3")
    assert drawn.table[0].tolist() == [0, 1, 2]
    assert drawn.table[2, 2] == nodes.index("m1@S1")
    assert drawn.table[1, :2].tolist() == [nodes.index("a1.h0"), nodes.index("a1.h1")]
    assert int(drawn.table.isnan().sum()) == 18 - len(nodes)


def test_heads_and_mlps_alone_can_be_drawn_as_boxes():
    assert SMALL.grid == (2, 3)
    assert of("m*@S2").grid is None
    assert WHOLE.grid is None


def test_nodes_are_a_level():
    assert (SMALL.kind, SMALL.part, SMALL.parts, SMALL.has_one_stream) == ("nodes", "component", "components", True)
    mask = SMALL.mask(["m1", "a0.h0"])
    assert SMALL.nodes(mask) == ("a0.h0", "m1")
    assert SMALL.counts(mask) == {"nodes": 2, "nodes_total": 8}
    assert (SMALL.entries_at_nodes(), SMALL.arrows(mask)) == (None, None)
    assert SMALL.largest(torch.arange(8.0), 2).tolist() == [False] * 6 + [True] * 2
    assert SMALL.describe() == "2 layers of 3 heads, width 6"


# Files


@pytest.mark.parametrize("nodes", [SMALL, WHOLE, of("m1@S1", "r2@-1", kinds=("mlp", "residual"))])
def test_a_header_gives_the_level_back(nodes):
    again = Nodes.from_header(json.loads(json.dumps(nodes.header())))
    assert again == nodes
    assert hash(again) == hash(nodes)
    assert again.names == nodes.names


def test_a_header_names_its_dictionaries_and_they_are_read_again(tmp_path):
    folder = save_dictionary(dictionary("r2"), tmp_path / "sae")
    nodes = of("f2.1", kinds=("features",), dictionaries=[DictionarySpec(str(folder)).load()])
    header = json.loads(json.dumps(nodes.header()))
    assert Nodes.from_header(header) == nodes
    save_dictionary(replace(dictionary("r2"), b_enc=torch.ones(5)), tmp_path / "other")
    (tmp_path / "sae").rename(tmp_path / "gone")
    with pytest.raises(ArtefactError, match="does not exist"):
        Nodes.from_header(header)
    (tmp_path / "other").rename(tmp_path / "sae")
    with pytest.raises(ArtefactError, match="has changed"):
        Nodes.from_header(header)


# What cannot be selected


@pytest.mark.parametrize(
    ("kinds", "dictionaries", "said"),
    [
        (("heads", "headz"), (), "sites names 'headz'. Did you mean heads"),
        (("heads", "heads"), (), "each once"),
        (("features",), (), "sites names features, which are those of a dictionary; set dictionaries"),
        (("features",), (dictionary("r1"), dictionary("m1")), "Two dictionaries are in the same layer"),
        (("features",), (dictionary("r1", width=7),), "has width 7, the model 6"),
        (("features",), (dictionary("r5"),), "no site 'r5' in a model of 4 layers"),
    ],
)
def test_kinds_and_dictionaries_that_do_not_fit_are_refused(kinds, dictionaries, said):
    with pytest.raises(ConfigurationError, match=said):
        of(kinds=kinds, dictionaries=dictionaries)
