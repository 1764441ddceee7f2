"""Sites are where the table says: their values against those of Hugging Face's own modules."""

from dataclasses import replace

import pytest
import torch

from oa_train.ablations.constants import Constants
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.engine.reading import read_values
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.models.dictionaries import Dictionary
from oa_train.models.families import FAMILIES
from oa_train.models.parts import Dimensions, find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import SITE_KINDS, Site, SiteKind, check_site_kinds, site_of_name
from tests.builders import random_batch, random_values, tiny_model
from tests.engine.selections import plain_kinds
from tests.precision import WithoutSinglePrecision

SIZES = Dimensions(n_layers=4, n_heads=2, d_head=3, d_model=8, d_mlp=5)
PLAIN_KINDS = [name for name in SITE_KINDS if name != "features"]
ARCHETYPES = ("gpt2", "gpt_neo", "llama", "gemma2")

# Of each archetype the modules of layer 1, written out: a module, and whether its input or its output is the value.
PATHS = {
    "gpt2": {
        "tokens": ("transformer.wte", "output"),
        "embedding": ("transformer.h.0", "input"),
        "residual": ("transformer.h.1", "input"),
        "heads": ("transformer.h.1.attn.c_proj", "input"),
        "attention": ("transformer.h.1.attn.c_proj", "output"),
        "neurons": ("transformer.h.1.mlp.act", "output"),
        "mlp": ("transformer.h.1.mlp", "output"),
    },
    "gpt_neo": {
        "tokens": ("transformer.wte", "output"),
        "embedding": ("transformer.h.0", "input"),
        "residual": ("transformer.h.1.ln_1", "input"),
        "heads": ("transformer.h.1.attn.attention.out_proj", "input"),
        "attention": ("transformer.h.1.attn.attention.out_proj", "output"),
        "neurons": ("transformer.h.1.mlp.act", "output"),
        "mlp": ("transformer.h.1.mlp", "output"),
    },
    "llama": {
        "tokens": ("model.embed_tokens", "output"),
        "embedding": ("model.layers.0.input_layernorm", "input"),
        "residual": ("model.layers.1.input_layernorm", "input"),
        "heads": ("model.layers.1.self_attn.o_proj", "input"),
        "attention": ("model.layers.1.self_attn.o_proj", "output"),
        "neurons": ("model.layers.1.mlp.down_proj", "input"),
        "mlp": ("model.layers.1.mlp", "output"),
    },
    "gemma2": {
        "tokens": ("model.embed_tokens", "output"),
        "embedding": ("model.layers.0.input_layernorm", "input"),
        "residual": ("model.layers.1.input_layernorm", "input"),
        "heads": ("model.layers.1.self_attn.o_proj", "input"),
        "attention": ("model.layers.1.post_attention_layernorm", "output"),
        "neurons": ("model.layers.1.mlp.down_proj", "input"),
        "mlp": ("model.layers.1.post_feedforward_layernorm", "output"),
    },
}


def passing(model, batch, path: str, side: str) -> torch.Tensor:
    """What passes at a module, by a hook of this test's own."""
    seen = []
    module = model.get_submodule(path)
    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long())
    handle.remove()
    return seen[0].view(*batch.tokens.shape, -1)


def test_the_archetypes_are_families_and_the_paths_name_every_kind():
    assert set(PATHS) == set(ARCHETYPES) <= FAMILIES.keys()
    assert all(set(paths) == set(PLAIN_KINDS) for paths in PATHS.values())


@pytest.mark.parametrize("family", ARCHETYPES)
def test_values_are_what_passes_at_the_modules(family):
    model, batch = tiny_model(family), random_batch([6, 6])
    nodes = Nodes.of(model.config, PLAIN_KINDS)
    values, sizes = read_values(model, batch, nodes), nodes.dimensions
    shapes = {"heads": (sizes.n_heads, sizes.d_head), "neurons": (sizes.d_mlp, 1)}
    for kind, (path, side) in PATHS[family].items():
        site = Site(kind, 0 if kind in ("tokens", "embedding") else 1)
        shape = shapes.get(kind, (1, sizes.d_model))
        assert nodes.sites[site] == shape
        assert values[site].shape == (2, 6, *shape)
        torch.testing.assert_close(values[site].flatten(2), passing(model, batch, path, side), rtol=0, atol=0)
    last = "transformer.ln_f" if family.startswith("gpt") else "model.norm"
    torch.testing.assert_close(values[Site("residual", 3)].flatten(2), passing(model, batch, last, "input"))


def test_every_block_adds_what_its_attention_and_its_mlp_add(any_model):
    batch = random_batch([7, 7])
    nodes = Nodes.of(any_model.config, plain_kinds(any_model))
    values, parts = read_values(any_model, batch, nodes), find_parts(any_model)
    before = values[Site("embedding")]
    for layer in range(3):
        attention, mlp = values[Site("attention", layer)], values[Site("mlp", layer)]
        torch.testing.assert_close(values[Site("residual", layer + 1)], before + attention + mlp)
        before = values[Site("residual", layer + 1)]
        if not parts.family.post_norms:
            written = parts.attention_outputs[layer](values[Site("heads", layer)].flatten(2))
            torch.testing.assert_close(attention.squeeze(2), written)
        if parts.down_projections and not parts.family.post_norms:
            # A row for each token, as OPT calls it.
            written = parts.down_projections[layer](values[Site("neurons", layer)].flatten(2))
            torch.testing.assert_close(mlp.squeeze(2), written)


@pytest.mark.parametrize("kind", PLAIN_KINDS)
@pytest.mark.parametrize("family", ARCHETYPES)
def test_a_unit_that_is_ablated_passes_its_replacement_on(family, kind):
    model, batch = tiny_model(family), random_batch([5, 7])
    nodes = Nodes.of(model.config, [kind])
    replacements = random_values(nodes, 2, 7)
    site, (n_units, _) = list(nodes.sites.items())[-1]
    name = nodes.names[-1]
    mask = torch.ones(2, len(nodes), dtype=torch.float64)
    mask[:, nodes.index(name)] = 0.25

    with torch.no_grad(), WithoutSinglePrecision():
        clean = read_values(model, batch, nodes)
        found = masked_logits(model, batch, nodes, mask, replacements)
        module, side = SITE_KINDS[kind].place_of(site.layer, find_parts(model), {})

        def mixed(tensor: torch.Tensor) -> torch.Tensor:
            shaped = tensor.reshape(2, 7, n_units, -1).clone()
            kept = batch.protected
            new = 0.25 * clean[site][:, :, -1] + 0.75 * replacements[site][:, :, -1]
            shaped[:, :, -1] = torch.where(kept.unsqueeze(-1), shaped[:, :, -1], new)
            return shaped.reshape(tensor.shape)

        if side == "input":
            handle = module.register_forward_pre_hook(lambda _, args: (mixed(args[0]), *args[1:]))
        else:
            handle = module.register_forward_hook(lambda _, __, output: mixed(output))
        expected = scored_logits(model, batch)
        handle.remove()
    torch.testing.assert_close(found, expected)
    assert (found - scored_logits(model, batch)).abs().max() > 1e-6


NORMED = SiteKind(
    "normed",
    "n{layer}",
    lambda sizes: range(sizes.n_layers),
    lambda sizes: (1, sizes.d_model),
    lambda parts, layer: (parts.blocks[layer].input_layernorm, "output"),
)


def test_a_kind_of_site_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(SITE_KINDS, "normed", NORMED)
    model, batch = tiny_model("llama"), random_batch([5, 6])
    nodes = Nodes.of(model.config, ["normed", "heads"], ["n*@-1", "a*"])
    assert [name for name in nodes.names if name.startswith("n")] == ["n0@-1", "n1@-1", "n2@-1"]
    constants = Constants.zeros(nodes)
    mask = torch.ones(2, len(nodes))
    mask[:, nodes.index("n1@-1")] = 0
    with torch.no_grad():
        found = masked_logits(model, batch, nodes, mask, constants.at(batch.positions))

        def last_is_zero(_, __, output):
            last = batch.attention_mask.sum(dim=1, keepdim=True) - 1
            return output.scatter(1, last.unsqueeze(-1).expand(-1, 1, output.shape[-1]), 0.0)

        handle = model.model.layers[1].input_layernorm.register_forward_hook(last_is_zero)
        expected = scored_logits(model, batch)
        handle.remove()
    torch.testing.assert_close(found, expected)
    with pytest.raises(ConfigurationError, match=r"'normal'\. Did you mean normed"):
        check_site_kinds("sites", ["normal"])


@pytest.mark.parametrize("site", ["r2", "r4", "m3", "a0", "r0"])
def test_features_stand_where_their_dictionary_reads(site):
    eye = torch.eye(8, dtype=torch.float64)
    dictionary = Dictionary(site, eye, torch.zeros(8).double(), eye, torch.zeros(8).double(), "identity")
    nodes = Nodes(SIZES, ("residual", "heads", "attention", "mlp", "embedding", "features"), (), (dictionary,))
    before = {"r2": "r2", "r4": "r4", "m3": "m3", "a0": "a0", "r0": "input"}[site]
    names = list(nodes.names)
    layer = site[1:]
    assert names[names.index(before) + 1 :][:8] == [f"f{layer}.{number}" for number in range(8)]
    assert nodes.sites[Site("features", int(layer))] == (8, 1)


def test_keys_of_sites():
    assert Site("heads", 3).key == "heads_3"
    assert Site.of_key("heads_3") == Site("heads", 3)
    assert Site.of_key(Site("embedding").key) == Site("embedding")
    for key in ("heads", "heads_", "headz_1", "heads_x", "", "_3"):
        with pytest.raises(ArtefactError, match="names no site"):
            Site.of_key(key)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["heads", "headz"], "sites names 'headz'. Did you mean heads"),
        (["mpl"], "'mpl'. Did you mean mlp"),
        (["Neurons"], "'Neurons'. Did you mean neurons"),
        (["heads", "heads"], "each once"),
        ([], "each once"),
    ],
)
def test_kinds_that_there_are_not_are_refused(kinds, said):
    with pytest.raises(ConfigurationError, match=said):
        check_site_kinds("sites", kinds)


@pytest.mark.parametrize(
    ("name", "said"),
    [("r5", "There is no site 'r5' in a model of 4 layers"), ("m4", "no site 'm4'"), ("a9", "no site 'a9'")],
)
def test_sites_that_no_dictionary_can_stand_on_are_refused(name, said):
    with pytest.raises(ConfigurationError, match=said):
        site_of_name(name, SIZES)


def test_a_family_without_a_down_projection_has_no_neurons(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], down_projection=""))
    nodes = Nodes.of(model.config, ["neurons"])
    with pytest.raises(ConfigurationError, match="'llama' have no sites of the kind 'neurons'"):
        read_values(model, random_batch([4]), nodes)
