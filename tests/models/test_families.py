"""The family table, and the parts that it leads to."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.engine.reading import read_values
from oa_train.errors import ModelError
from oa_train.models.families import FAMILIES, check_config, check_family
from oa_train.models.frozen import freeze
from oa_train.models.hooks import Tap, tapped
from oa_train.models.parts import Dimensions, find_parts
from oa_train.models.residual import find_residual_parts
from oa_train.models.selection import Nodes
from tests.builders import TINY_CONFIGS, VOCABULARY, random_batch, tiny_model


def test_every_family_stands_under_its_own_name():
    assert all(check_family(name).model_type == name for name in FAMILIES)
    assert {"gpt2", "llama"} <= FAMILIES.keys() == TINY_CONFIGS.keys()


@pytest.mark.parametrize(("name", "words"), [("rwkv", "Valid names: .*gpt2.*llama"), ("gpt-2", "Did you mean gpt2")])
def test_another_family_is_refused_with_those_that_there_are(name, words):
    with pytest.raises(ModelError, match=f"'{name}' are not supported. {words}") as caught:
        check_family(name)
    assert "one entry in oa_train/models/families.py; docs/extending.md shows how" in str(caught.value)


def test_a_model_that_norms_its_residual_stream_is_refused():
    # So is OPT-350m. Its blocks norm after they have added, so that no part's output stays in the stream.
    options = TINY_CONFIGS["opt"] | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
    config = AutoConfig.for_model("opt", vocab_size=VOCABULARY, **options)
    with pytest.raises(
        ModelError, match="'opt' are not supported where do_layer_norm_before is False: it norms the residual"
    ):
        find_parts(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("falcon", {"parallel_attn": True}, "parallel_attn is True: it adds .* in place"),
        ("falcon", {"parallel_attn": False, "new_decoder_architecture": True}, "new_decoder_architecture is True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "norms the residual stream itself"),
    ],
)
def test_models_that_do_not_fit_are_refused_with_the_reason(family, options, words):
    with pytest.raises(ModelError, match=f"'{family}' are not supported where .*{words}"):
        check_config(AutoConfig.for_model(family, **options))


def test_a_scaled_residual_is_folded_into_the_weights():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("granite", vocab_size=VOCABULARY, **TINY_CONFIGS["granite"]), dtype=torch.float64
    ).eval()
    tokens = torch.tensor([[1, 5, 6, 7]])
    with pytest.raises(ModelError, match=r"multiply what they add by residual_multiplier\. .* both fold the factor"):
        find_parts(model)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        assert freeze(freeze(model)) is model  # the second time changes nothing
        torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-12, atol=1e-12)
    assert model.config.residual_multiplier == 1
    assert find_parts(model)


@pytest.mark.parametrize(
    ("family", "options", "parallel"),
    [
        ("gpt2", {}, False),
        ("gpt_neox", {}, True),
        ("gpt_neox", {"use_parallel_residual": False}, False),
        ("gptj", {}, True),
        ("phi", {}, True),
        ("stablelm", {"use_parallel_residual": True}, True),
        ("stablelm", {}, False),
        ("opt", {}, False),
    ],
)
def test_parallel_blocks_are_told_from_others(family, options, parallel):
    assert check_config(AutoConfig.for_model(family, **options)).parallel is parallel


def test_post_norms_are_named():
    assert {name for name in FAMILIES if FAMILIES[name].post_norms} == {"gemma2", "gemma3_text", "olmo2", "olmo3"}


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("gpt2", {"n_layer": 5, "n_head": 3, "n_embd": 12}, (5, 3, 4, 12, 48)),
        (
            "llama",
            {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "head_dim": 12},
            (2, 4, 12, 32, 11008),
        ),
        ("llama", {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}, (2, 4, 8, 32, 11008)),
        ("opt", {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "ffn_dim": 7}, (2, 4, 8, 32, 7)),
        ("gpt2", {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_inner": 5}, (2, 4, 8, 32, 5)),
    ],
)
def test_sizes_are_read_from_the_configuration(family, options, expected):
    assert Dimensions.of(AutoConfig.for_model(family, **options)) == Dimensions(*expected)


def test_a_head_width_of_none_is_the_share_of_the_model():
    config = SimpleNamespace(num_attention_heads=4, hidden_size=32, head_dim=None, num_hidden_layers=1)
    assert Dimensions.of(config).d_head == 8


def test_a_model_that_is_spread_over_devices_is_refused():
    model = tiny_model("gpt2")
    # What `from_pretrained(device_map=...)` leaves.
    model.hf_device_map = {"": "cpu"}
    assert find_parts(model)
    model.hf_device_map = {"transformer.wte": 0, "transformer.h": 1, "lm_head": "cpu"}
    with pytest.raises(ModelError, match=r"spread over 0, 1, cpu \(device_map\)\. .* --trainer\.strategy fsdp"):
        find_parts(model)


def test_parts_have_the_sizes_of_the_configuration(any_model):
    parts = find_parts(any_model)
    sizes = parts.dimensions
    assert (sizes.n_layers, sizes.n_heads, sizes.d_model) == (3, 4, 32)
    assert sizes.d_head == TINY_CONFIGS[any_model.config.model_type].get("head_dim", 8)
    assert len(set(parts.attention_outputs)) == len(set(parts.mlps)) == 3
    heads = torch.randn(2, 5, sizes.n_heads * sizes.d_head, dtype=torch.float64)
    residual = torch.randn(2, 5, sizes.d_model, dtype=torch.float64)
    assert all(projection(heads).shape == (2, 5, sizes.d_model) for projection in parts.attention_outputs)
    written: list[torch.Tensor] = []
    with tapped(Tap(mlp, "output", written.append) for mlp in parts.mlps):
        any_model(input_ids=torch.tensor([[1, 5, 6]]))
    assert [(value.numel(), value.shape[-1]) for value in written] == [(3 * sizes.d_model, sizes.d_model)] * 3
    assert parts.unembedding(residual).shape == (2, 5, VOCABULARY)


def test_parts_stand_in_the_order_of_the_layers(any_model):
    parts = find_parts(any_model)
    called = []
    modules = [module for pair in zip(parts.attention_outputs, parts.mlps, strict=True) for module in pair]
    modules.append(parts.unembedding)
    handles = [module.register_forward_hook(lambda module, *_: called.append(module)) for module in modules]
    any_model(input_ids=torch.tensor([[1, 5, 6]]))
    for handle in handles:
        handle.remove()
    assert [id(module) for module in called] == [id(module) for module in modules]


@pytest.mark.parametrize("n_layers", [2, 4])
def test_another_number_of_blocks_is_refused(n_layers):
    model = tiny_model("llama")
    model.config.num_hidden_layers = n_layers
    with pytest.raises(ModelError, match=f"names {n_layers} layers, the model has 3"):
        find_parts(model)


@pytest.mark.parametrize("path", ["model.layers", "model.layers.1.self_attn.o_proj", "model.layers.2.mlp"])
def test_a_model_that_is_built_otherwise_is_refused(path):
    model = copy.deepcopy(tiny_model("llama"))
    parent, _, name = path.rpartition(".")
    delattr(model.get_submodule(parent), name)
    with pytest.raises(ModelError, match=f"llama model is not built as its entry .*{name}"):
        find_parts(model)


def test_a_model_of_another_family_is_refused():
    model = tiny_model("gpt2")
    model.config.model_type = "rwkv"
    with pytest.raises(ModelError, match="'rwkv'"):
        find_parts(model)


def test_modules_that_are_swapped_or_change_their_class_are_looked_up_again():
    model, other = tiny_model("llama"), find_parts(tiny_model("llama"))
    assert find_parts(model) is find_parts(model)
    model.set_output_embeddings(other.unembedding)
    model.set_input_embeddings(other.token_embedding)
    model.model.layers[1] = other.blocks[1]
    parts = find_parts(model)
    assert parts.unembedding is other.unembedding
    assert parts.token_embedding is other.token_embedding
    assert parts.blocks[1] is other.blocks[1]
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    assert find_parts(model) is not parts


def test_parts_are_looked_up_once():
    model = tiny_model("llama")
    parts = find_parts(model)
    assert find_parts(model) is parts
    assert find_residual_parts(model) is find_residual_parts(model)
    assert find_parts(tiny_model("llama")) is not parts


@pytest.mark.parametrize(
    "path", ["model.layers.1.mlp", "model.layers.2.self_attn.o_proj", "model.layers.0", "model.norm", "lm_head"]
)
def test_a_module_that_is_swapped_is_noticed(path):
    model = tiny_model("llama")
    before = find_parts(model)
    parent, _, name = path.rpartition(".")
    swapped = copy.deepcopy(model.get_submodule(path))
    setattr(model.get_submodule(parent), name, swapped)
    after = find_parts(model)
    assert after is not before
    members = (*after.blocks, *after.mlps, *after.attention_outputs, after.final_norm, after.unembedding)
    assert any(module is swapped for module in members)
    assert find_parts(model) is after


def test_a_swapped_mlp_is_the_one_that_is_ablated():
    model, batch = tiny_model("llama"), random_batch([5, 7])
    nodes = Nodes.of(model.config)
    with torch.no_grad():
        find_parts(model)
        model.model.layers[1].mlp.down_proj = torch.nn.Linear(48, 32, bias=False, dtype=torch.float64)
        model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
        values = read_values(model, batch, nodes)
        # All ablated by their own values is the model.
        mask = torch.zeros(2, len(nodes), dtype=torch.float64)
        logits = masked_logits(model, batch, nodes, mask, values)
        torch.testing.assert_close(logits, scored_logits(model, batch))
        nothing = values.mapped(torch.zeros_like)
        mask[:, [nodes.index(name) for name in nodes.names if name != "m1"]] = 1
        model.model.layers[1].mlp.down_proj.weight.zero_()
        assert torch.equal(masked_logits(model, batch, nodes, mask, nothing), scored_logits(model, batch))


def test_a_model_that_is_compiled_as_a_whole_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(ModelError, match=r"torch\.compile\(model\).*\n.*model\._orig_mod"):
        find_parts(torch.compile(model, backend="eager"))
