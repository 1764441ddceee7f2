"""Dictionaries of each layout compute what their format defines, and what cannot be exact is refused by name."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oa_train.errors import ArtefactError, RunError
from oa_train.models.dictionaries import Dictionary, load_dictionary, save_dictionary
from oa_train.models.dictionary_layouts import MOST_CONFIG_BYTES, site_of_hook

D_MODEL, N_FEATURES = 5, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors_of(seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = {
        "W_enc": (D_MODEL, N_FEATURES),
        "b_enc": (N_FEATURES,),
        "W_dec": (N_FEATURES, D_MODEL),
        "b_dec": (D_MODEL,),
    }
    return {name: draw(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


def dictionary(activation="relu", **settings) -> Dictionary:
    t = tensors_of()
    return Dictionary(
        **{"site": "r3", "w_enc": t["W_enc"], "b_enc": t["b_enc"], "w_dec": t["W_dec"], "b_dec": t["b_dec"]}
        | {"activation": activation}
        | settings
    )


X = draw(2, 3, D_MODEL, seed=50)


def write(folder: Path, weights: str, tensors: dict[str, torch.Tensor], config=None, metadata=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / weights, metadata)
    if config is not None:
        (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def sae_lens(folder: Path, extra: dict[str, torch.Tensor] | None = None, without=(), **config) -> Path:
    defaults = {"architecture": "standard", "d_in": D_MODEL, "d_sae": N_FEATURES, "dtype": "float64"}
    metadata = {"sae_lens_version": "6.20.0", "hook_name": "blocks.3.hook_resid_pre", "hook_head_index": None}
    tensors = {name: t for name, t in (tensors_of() | (extra or {})).items() if name not in without}
    return write(folder, "sae_weights.safetensors", tensors, defaults | {"metadata": metadata} | config)


def sparsify(parent: Path, name: str = "layers.3", extra=None, **config) -> Path:
    t = tensors_of()
    tensors = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    defaults = {"d_in": D_MODEL, "k": 2, "activation": "topk", "num_latents": 0, "expansion_factor": 32}
    defaults |= {"normalize_decoder": True, "multi_topk": False, "skip_connection": False, "transcode": False}
    return write(parent / name, "sae.safetensors", tensors | (extra or {}), defaults | config)


def plain(file: Path, metadata=None, **tensors) -> Path:
    t = tensors_of()
    names = {"w_enc": t["W_enc"], "b_enc": t["b_enc"], "w_dec": t["W_dec"], "b_dec": t["b_dec"]} | tensors
    save_file({name: tensor.contiguous() for name, tensor in names.items() if tensor is not None}, file, metadata)
    return file


def largest(code: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest entries of each row by sorting, zero elsewhere."""
    ranks = code.argsort(-1, descending=True).argsort(-1)
    return torch.where(ranks < k, code, 0.0)


def agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# The law of a dictionary


def test_an_identity_dictionary_encodes_and_decodes_to_the_input():
    eye, zeros = torch.eye(D_MODEL, dtype=torch.float64), torch.zeros(D_MODEL, dtype=torch.float64)
    identity = Dictionary("m0", eye, zeros, eye, zeros, "identity")
    assert torch.equal(identity.encode(X), X)
    assert torch.equal(identity.decode_change(X), X)
    assert (identity.n_features, identity.d_model, identity.layer) == (D_MODEL, D_MODEL, 0)


@pytest.mark.parametrize("activation", ["identity", "relu", "jumprelu", "topk", "groupmax"])
def test_nothing_replaced_changes_nothing_and_a_changed_feature_adds_its_direction(activation):
    settings = {"jumprelu": {"threshold": draw(N_FEATURES).abs()}, "topk": {"k": 3}, "groupmax": {"k": 4}}
    read = dictionary(activation, **settings.get(activation, {}))
    code = read.encode(X)
    assert code.shape == (2, 3, N_FEATURES)
    assert read.decode_change(code - code).eq(0).all()
    changed = code.clone()
    changed[..., 6] += 2.5
    agree(read.decode_change(changed - code), 2.5 * read.w_dec[6].expand(2, 3, D_MODEL))


def test_activations_are_their_definitions():
    t, threshold = tensors_of(), torch.tensor([0.5, -1.0, 0.0, 2.0, 0.1, 0.0, 9.0, 0.3], dtype=torch.float64)
    before = X @ t["W_enc"] + t["b_enc"]
    positive = before.clamp_min(0)
    agree(dictionary("identity").encode(X), before)
    agree(dictionary("relu").encode(X), positive)
    jumped = positive * (before > threshold)
    assert 0 < (jumped != positive).sum() < jumped.numel()
    agree(dictionary("jumprelu", threshold=threshold).encode(X), jumped)
    agree(dictionary("topk", k=3).encode(X), largest(before, 3).clamp_min(0))
    agree(dictionary("topk", k=N_FEATURES).encode(X), positive)
    groups = torch.cat([largest(positive[..., :4], 1), largest(positive[..., 4:], 1)], dim=-1)
    agree(dictionary("groupmax", k=2).encode(X), groups)
    shifted = dictionary("relu", subtracts_decoder_bias=True)
    agree(shifted.encode(X), ((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).clamp_min(0))
    centred = dictionary("relu", subtracts_decoder_bias=True, centres_input=True)
    agree(centred.encode(X + 7), ((X - X.mean(-1, keepdim=True) - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).clamp_min(0))


def test_the_code_is_differentiable():
    x = X.clone().requires_grad_()
    for read in (dictionary("topk", k=3), dictionary("groupmax", k=2), dictionary("relu", centres_input=True)):
        assert torch.autograd.gradcheck(lambda x, read=read: read.decode_change(read.encode(x)), (x,))


def test_half_precision_computes_in_float32_also_under_autocast():
    read = dictionary("relu").to("cpu", torch.bfloat16)
    x = X.bfloat16()
    expected = (x.float() @ read.w_enc.float() + read.b_enc.float()).relu()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        code, change = read.encode(x), read.decode_change(x.new_ones(N_FEATURES))
    assert torch.equal(code, expected)
    assert torch.equal(change, torch.ones(N_FEATURES) @ read.w_dec.float())
    assert dictionary("relu").encode(X.float()).dtype == torch.float32


def test_to_moves_every_tensor_and_keeps_the_rest():
    read = dictionary("jumprelu", threshold=draw(N_FEATURES), subtracts_decoder_bias=True, path="somewhere")
    half = read.to("cpu", torch.float16)
    assert {t.dtype for t in (half.w_enc, half.b_enc, half.w_dec, half.b_dec, half.threshold)} == {torch.float16}
    assert (half.site, half.activation, half.path, half.subtracts_decoder_bias) == (
        "r3",
        "jumprelu",
        "somewhere",
        True,
    )
    assert read.w_enc.dtype == torch.float64


def test_the_fingerprint_changes_with_any_number_or_setting_and_with_nothing_else():
    read = dictionary("jumprelu", threshold=draw(N_FEATURES))
    assert len(read.fingerprint) == 16
    int(read.fingerprint, 16)
    same = [dictionary("jumprelu", threshold=draw(N_FEATURES), path="elsewhere"), read.to("cpu")]
    assert {other.fingerprint for other in same} == {read.fingerprint}
    single = read.to("cpu", torch.float32)
    assert single.fingerprint == single.to("cpu", torch.float64).fingerprint != read.fingerprint
    prints = {read.fingerprint}
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        tensor = getattr(read, name).clone()
        tensor.view(-1)[-1] = tensor.view(-1)[-1].nextafter(torch.tensor(math.inf, dtype=torch.float64))
        prints.add(dictionary("jumprelu", **{"threshold": read.threshold, name: tensor}).fingerprint)
    for setting in ({"site": "m3"}, {"subtracts_decoder_bias": True}, {"centres_input": True}):
        prints.add(dictionary("jumprelu", threshold=read.threshold, **setting).fingerprint)
    prints |= {dictionary("topk", k=2).fingerprint, dictionary("topk", k=3).fingerprint}
    assert len(prints) == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "r03"}, "not a site"),
        ({"site": "a3.h5"}, "not a site"),
        ({"site": "r3\n"}, "not a site"),
        *(({"site": site}, "not a site") for site in ("x3", "r", "r-1", "m3.n1", "")),
        ({"activation": "jumprelu"}, "no threshold"),
        ({"threshold": draw(N_FEATURES)}, "a threshold with relu"),
        ({"activation": "topk"}, "k None with topk"),
        ({"k": 2}, "k 2 with relu"),
        ({"activation": "topk", "k": 0}, "Expected 1 to 8"),
        ({"activation": "topk", "k": 9}, "Expected 1 to 8"),
        ({"activation": "groupmax", "k": 3}, "8 features in 3 groups"),
        ({"b_dec": torch.full((D_MODEL,), math.nan)}, "NaN or infinite numbers in b_dec"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ArtefactError, match=message):
        dictionary(**changes)


# SAELens


def test_sae_lens_standard(tmp_path):
    t = tensors_of()
    write(tmp_path / "sae", "sparsity.safetensors", {"sparsity": draw(N_FEATURES)})
    read = load_dictionary(sae_lens(tmp_path / "sae"))
    agree(read.encode(X), ((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu())
    agree(read.decode_change(read.encode(X)), read.encode(X) @ t["W_dec"])
    assert (read.site, read.layer, read.path) == ("r3", 3, str(tmp_path / "sae" / "sae_weights.safetensors"))
    assert load_dictionary(tmp_path / "sae" / "sae_weights.safetensors").fingerprint == read.fingerprint
    kept = load_dictionary(sae_lens(tmp_path / "kept", apply_b_dec_to_input=False, normalize_activations="none"))
    agree(kept.encode(X), (X @ t["W_enc"] + t["b_enc"]).relu())


def test_sae_lens_before_version_6_names_its_settings_otherwise(tmp_path):
    t, old = tensors_of(), {"hook_point": "blocks.2.hook_mlp_out", "hook_point_head_index": None, "metadata": None}
    old |= {"architecture": None, "normalize_activations": None, "finetuning_scaling_factor": False}
    extra = {"scaling_factor": torch.ones(N_FEATURES, dtype=torch.float64)}
    read = load_dictionary(sae_lens(tmp_path / "relu", extra, activation_fn_str="relu", **old))
    assert read.site == "m2"
    agree(read.encode(X), ((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu())
    options = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
    read = load_dictionary(sae_lens(tmp_path / "topk", **(old | options | {"normalize_activations": False})))
    agree(read.encode(X), largest((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 2).relu())


@pytest.mark.parametrize("stored", ["threshold", "log_threshold"])
def test_sae_lens_jumprelu(tmp_path, stored):
    t, threshold = tensors_of(), draw(N_FEATURES, seed=9).abs()
    extra = {stored: threshold if stored == "threshold" else threshold.log()}
    read = load_dictionary(sae_lens(tmp_path / "sae", extra, architecture="jumprelu"))
    before = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    agree(read.encode(X), before.relu() * (before > threshold))


def test_sae_lens_topk_whose_decoder_norms_rescale_the_code(tmp_path):
    t = tensors_of()
    before = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    read = load_dictionary(sae_lens(tmp_path / "plain", architecture="topk", k=3))
    agree(read.encode(X), largest(before, 3).relu())
    read = load_dictionary(sae_lens(tmp_path / "scaled", architecture="topk", k=3, rescale_acts_by_decoder_norm=True))
    norms = t["W_dec"].square().sum(-1).sqrt()
    code = largest(before * norms, 3).relu()
    agree(read.encode(X), code)
    agree(read.decode_change(code), (code / norms) @ t["W_dec"])


def test_sae_lens_gated(tmp_path):
    t = tensors_of()
    b_gate, b_mag, r_mag = draw(N_FEATURES, seed=20), draw(N_FEATURES, seed=21), draw(N_FEATURES, seed=22)
    extra = {"b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag}
    read = load_dictionary(sae_lens(tmp_path / "sae", extra, without=("b_enc",), architecture="gated"))
    x = X - t["b_dec"]
    gate = x @ t["W_enc"] + b_gate > 0
    magnitude = (x @ (t["W_enc"] * r_mag.exp()) + b_mag).relu()
    assert (gate & (magnitude > 0)).any()
    assert (~gate & (magnitude > 0)).any()
    assert (gate & (magnitude == 0)).any()
    agree(read.encode(X), gate * magnitude)
    agree(read.decode_change(gate * magnitude), (gate * magnitude) @ t["W_dec"])


def test_sae_lens_of_centred_writing_weights_reads_the_centred_stream(tmp_path):
    metadata = {"hook_name": "blocks.3.hook_resid_pre"}
    centred = metadata | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    stated = load_dictionary(sae_lens(tmp_path / "stated", metadata=centred))
    silent = load_dictionary(sae_lens(tmp_path / "silent", metadata=metadata), centres_input=True)
    t, x = tensors_of(), X - X.mean(-1, keepdim=True)
    agree(stated.encode(X), ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu())
    assert stated.fingerprint == silent.fingerprint
    assert load_dictionary(tmp_path / "stated", centres_input=False).centres_input is False


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "jumprelo"}, "Did you mean jumprelu"),
        ({"architecture": "matching_pursuit"}, "Valid names: standard, topk, jumprelu, gated"),
        ({"architecture": ["topk"]}, "architecture"),
        ({"architecture": "jumprelu_transcoder"}, "architecture 'jumprelu_transcoder'"),
        ({"normalize_activations": "layer_norm"}, "scale of each token"),
        ({"normalize_activations": "constant_norm_rescale"}, "scale of each token"),
        ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": "covariance_whitening"}, "not in these files"),
        ({"normalize_activations": True}, "fold_activation_norm_scaling_factor"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"architecture": "topk"}, "has k None"),
        ({"architecture": "topk", "k": 2.5}, "has k 2.5"),
        ({"architecture": "topk", "k": True}, "has k True"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2, "signed": True}}, "signed True"),
        ({"activation_fn_kwargs": [1]}, "Expected a JSON object"),
        ({"normalize_decoder": True}, "normalize_decoder True"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input 'yes'"),
        ({"d_in": 6}, r"encoder of shape \[5, 8\], where cfg.json says \[6, 8\]"),
        ({"d_sae": 16}, r"cfg.json says \[5, 16\]"),
        ({"metadata": {"hook_name": "blocks.3.attn.hook_z"}}, "'blocks.3.attn.hook_z', which is not a site"),
        ({"metadata": {"hook_name": "blocks.3.hook_resid_mid"}}, "Did you mean hook_resid_pre"),
        ({"metadata": {"hook_name": "hook_embed"}}, "not a site"),
        ({"metadata": {"hook_name": "blocks.3.hook_mlp_out", "hook_head_index": 2}}, "hook_head_index 2"),
        ({"metadata": {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "x"}}, "transcoder"),
        ({"metadata": {}}, "does not say where it reads"),
        ({"metadata": 3}, "metadata 3"),
    ],
)
def test_sae_lens_variants_that_cannot_be_exact_are_refused(tmp_path, config, message):
    with pytest.raises(ArtefactError, match=message):
        load_dictionary(sae_lens(tmp_path / "sae", **config))


def test_sae_lens_tensors_that_do_not_fit_the_architecture_are_refused(tmp_path):
    scale = {"finetuning_scaling_factor": draw(N_FEATURES)}
    with pytest.raises(ArtefactError, match="finetuning_scaling_factor other than 1"):
        load_dictionary(sae_lens(tmp_path / "scaled", scale))
    with pytest.raises(ArtefactError, match="has no threshold"):
        load_dictionary(sae_lens(tmp_path / "jump", architecture="jumprelu"))
    with pytest.raises(ArtefactError, match="has no b_dec"):
        load_dictionary(sae_lens(tmp_path / "short", without=("b_dec",)))
    with pytest.raises(ArtefactError, match="tensor 'threshold', which is not supported"):
        load_dictionary(sae_lens(tmp_path / "stray", {"threshold": draw(N_FEATURES)}))
    both = {"threshold": draw(N_FEATURES), "log_threshold": draw(N_FEATURES)}
    with pytest.raises(ArtefactError, match="has both 'threshold' and"):
        load_dictionary(sae_lens(tmp_path / "both", both, architecture="jumprelu"))
    gated = {name: draw(N_FEATURES) for name in ("b_gate", "b_mag", "r_mag")}
    for name, shape in (("r_mag", (3,)), ("W_dec", (D_MODEL, N_FEATURES))):
        with pytest.raises(ArtefactError, match=f"has {name} of shape"):
            load_dictionary(
                sae_lens(tmp_path / name, gated | {name: draw(*shape)}, without=("b_enc",), architecture="gated")
            )
    with pytest.raises(ArtefactError, match=r"encoder of shape \[8, 5\]"):
        load_dictionary(sae_lens(tmp_path / "turned", {"W_enc": draw(N_FEATURES, D_MODEL)}))


# sparsify


def test_sparsify_topk(tmp_path):
    t = tensors_of()
    read = load_dictionary(sparsify(tmp_path))
    assert (read.site, read.k) == ("r4", 2)
    before = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    agree(read.encode(X), largest(before.relu(), 2))
    agree(read.decode_change(read.encode(X)), read.encode(X) @ t["W_dec"])
    seeded = load_dictionary(sparsify(tmp_path, "h.3.mlp/seed1", activation="groupmax", num_latents=N_FEATURES))
    assert seeded.site == "m3"
    halves = before.relu().split(4, dim=-1)
    agree(seeded.encode(X), torch.cat([largest(half, 1) for half in halves], dim=-1))


def test_a_skip_connection_of_sparsify_changes_no_change(tmp_path):
    skip = sparsify(tmp_path, "h.3.attn", {"W_skip": draw(D_MODEL, D_MODEL)}, skip_connection=True)
    without = sparsify(tmp_path, "layers.3.self_attn")
    assert load_dictionary(skip).site == "a3"
    assert load_dictionary(skip).fingerprint == load_dictionary(without).fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transcode": True}, "transcoder writes elsewhere"),
        ({"gram_lookup": True}, "gram_lookup True"),
        ({"signed": True}, "signed True"),
        ({"activation": "groupmin"}, "Did you mean groupmax"),
        ({"activation": ["topk"]}, "activation"),
        ({"k": None}, "has k None"),
        ({"k": 1000}, "Expected 1 to 8"),
        ({"d_in": 7}, r"cfg.json says \[None, 7\]"),
        ({"num_latents": 9}, r"cfg.json says \[9, 5\]"),
        ({"extra": {"embed_skip.weight": draw(D_MODEL, D_MODEL)}}, "tensor 'embed_skip.weight'"),
        ({"name": "layers.3.mlp.act"}, "'layers.3.mlp.act', which is not a site"),
        ({"name": "my-dictionary"}, "does not say where it reads"),
    ],
)
def test_sparsify_variants_that_cannot_be_exact_are_refused(tmp_path, config, message):
    with pytest.raises(ArtefactError, match=message):
        load_dictionary(sparsify(tmp_path, **config))


def test_a_site_fills_in_what_a_renamed_folder_does_not_say(tmp_path):
    assert load_dictionary(sparsify(tmp_path, "my-dictionary"), site="a7").site == "a7"
    assert load_dictionary(sparsify(tmp_path, "layers.3"), site="r4").site == "r4"
    with pytest.raises(ArtefactError, match=r"reads at r4, not at r3"):
        load_dictionary(tmp_path / "layers.3", site="r3")


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.0.hook_resid_pre", "r0"),
        ("blocks.11.hook_resid_post", "r12"),
        ("blocks.3.hook_mlp_out", "m3"),
        ("blocks.3.hook_attn_out", "a3"),
        ("layers.3", "r4"),
        ("model.layers.3.mlp", "m3"),
        ("gpt_neox.layers.10.attention", "a10"),
        ("transformer.h.3", "r4"),
        ("h.3.attn", "a3"),
        ("model.layers.3.self_attn", "a3"),
        ("embed_tokens", None),
        ("layers", None),
        ("blocks.x.hook_mlp_out", None),
    ],
)
def test_hooks_name_sites(hook, site):
    assert site_of_hook(hook, "test") == site


@pytest.mark.parametrize("hook", ["layers.3.hook_mlp_out", "layers.3.mlp.down_proj", "blocks.3.mlp", "h.3.ln_1"])
def test_hooks_at_other_places_of_a_layer_are_refused(hook):
    with pytest.raises(ArtefactError, match="not a site"):
        site_of_hook(hook, "test")


# The plain layout


def test_a_plain_file_takes_its_settings_from_the_header(tmp_path):
    t = tensors_of()
    read = load_dictionary(plain(tmp_path / "relu.safetensors"), site="m1")
    agree(read.encode(X), (X @ t["W_enc"] + t["b_enc"]).relu())
    metadata = {"site": "a2", "activation": "topk", "k": "3", "subtracts_decoder_bias": "true"}
    capital = {"w_enc": None, "w_dec": None, "W_enc": t["W_enc"], "W_dec": t["W_dec"]}
    read = load_dictionary(plain(tmp_path / "topk.safetensors", metadata, **capital))
    assert read.site == "a2"
    agree(read.encode(X), largest((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 3).relu())
    read = load_dictionary(plain(tmp_path / "jump.safetensors", {"site": "r1"}, threshold=draw(N_FEATURES).abs()))
    assert read.activation == "jumprelu"


def test_numbers_are_read_in_their_widest_precision_and_float32_at_least(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in tensors_of().items()}
    read = load_dictionary(write(tmp_path / "half", "dictionary.safetensors", half), site="r1")
    assert {t.dtype for t in (read.w_enc, read.b_enc, read.w_dec, read.b_dec)} == {torch.float32}
    assert torch.equal(read.w_enc, half["W_enc"].float())
    mixed = half | {"b_dec": tensors_of()["b_dec"]}
    assert (
        load_dictionary(write(tmp_path / "mixed", "dictionary.safetensors", mixed), "r1").w_enc.dtype == torch.float64
    )


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"site": "r1", "k": "two"}, {}, "has k 'two'"),
        ({"site": "r1", "k": "9" * 5000}, {}, "has k '999"),
        ({"site": "r1", "activation": "top-k", "k": "2"}, {}, "Did you mean topk"),
        ({"site": "r1", "centres_input": "maybe"}, {}, "centres_input 'maybe'"),
        ({"site": "block 1"}, {}, "'block 1', which is not a site"),
        ({"site": "r1"}, {"b_enc": None}, "has no b_enc"),
        ({"site": "r1"}, {"b_encoder": draw(3)}, "Did you mean b_enc"),
        ({"site": "r1"}, {"W_enc": draw(D_MODEL, N_FEATURES)}, "has both"),
        (
            {"site": "r1"},
            {"w_dec": draw(D_MODEL, N_FEATURES)},
            r"w_dec of shape \[5, 8\] with w_enc of shape \[5, 8\]",
        ),
        ({"site": "r1"}, {"b_dec": draw(N_FEATURES)}, "b_dec of shape"),
        ({"site": "r1"}, {"b_enc": draw(N_FEATURES, 1)}, "b_enc of shape"),
        ({"site": "r1"}, {"w_enc": draw(N_FEATURES)}, "w_enc of shape"),
        ({"site": "r1"}, {"w_enc": draw(0, N_FEATURES)}, "w_enc of shape"),
        ({"site": "r1"}, {"b_dec": torch.zeros(D_MODEL, dtype=torch.int32)}, "'b_dec' in torch.int32"),
        ({"site": "r1"}, {"b_dec": torch.zeros(D_MODEL).to(torch.float8_e4m3fn)}, "float8"),
        ({"site": "r1"}, {"b_dec": torch.full((D_MODEL,), math.inf)}, "NaN or infinite"),
        (None, {}, "does not say where it reads"),
    ],
)
def test_plain_files_that_are_not_a_dictionary_are_refused(tmp_path, metadata, tensors, message):
    with pytest.raises(ArtefactError, match=message):
        load_dictionary(plain(tmp_path / "x.safetensors", metadata, **tensors))


@pytest.mark.parametrize(
    "saved",
    [
        dictionary("relu", subtracts_decoder_bias=True),
        dictionary("identity", site="a0", centres_input=True),
        dictionary("jumprelu", site="m12", threshold=draw(N_FEATURES)),
        dictionary("topk", k=3),
        dictionary("groupmax", k=4).to("cpu", torch.float32),
    ],
    ids=lambda saved: saved.activation,
)
def test_what_is_saved_is_read_again(tmp_path, saved):
    folder = save_dictionary(saved, tmp_path / "new" / "folder")
    read = load_dictionary(folder)
    assert folder == tmp_path / "new" / "folder"
    assert read.fingerprint == saved.fingerprint
    assert read.w_enc.dtype == saved.w_enc.dtype
    assert torch.equal(read.encode(X), saved.encode(X))
    assert [file.name for file in folder.iterdir()] == ["dictionary.safetensors"]


def test_saving_overwrites_nothing_and_leaves_nothing_half(tmp_path, monkeypatch):
    saved = dictionary("relu")
    save_dictionary(saved, tmp_path / "x")
    with pytest.raises(ArtefactError, match="never overwritten"):
        save_dictionary(saved, tmp_path / "x")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        save_dictionary(saved, tmp_path / "y")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


# What is no dictionary


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_pickles_are_never_opened(tmp_path):
    for name in ("sae.pt", "sae.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Harmful()))
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"Pickles and \.npz files are not read"):
        load_dictionary(tmp_path / "sae.pt", site="r1")
    with pytest.raises(ArtefactError, match="is damaged"):
        load_dictionary(tmp_path, site="r1")


def test_unknown_layouts_are_refused_with_what_the_folder_holds(tmp_path):
    with pytest.raises(ArtefactError, match="nowhere does not exist"):
        load_dictionary(tmp_path / "nowhere")
    sparsify(tmp_path / "all", "layers.3")
    with pytest.raises(ArtefactError, match=r"It holds layers\.3\. Expected .*sae_weights\.safetensors"):
        load_dictionary(tmp_path / "all")
    (sae_lens(tmp_path / "two") / "sae.safetensors").write_bytes(b"")
    with pytest.raises(ArtefactError, match="exactly one of"):
        load_dictionary(tmp_path / "two")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "holds a list"),
        (b" " * (MOST_CONFIG_BYTES + 1), "too long"),
        (None, "cannot be read"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, content, message):
    folder = sae_lens(tmp_path / "sae")
    (folder / "cfg.json").unlink()
    if content is not None:
        (folder / "cfg.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        load_dictionary(folder)


def test_truncated_weights_are_refused(tmp_path):
    folder = sae_lens(tmp_path / "sae")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ArtefactError, match="is damaged"):
        load_dictionary(folder)


def test_neither_transformers_nor_lightning_is_imported():
    code = "import sys, oa_train.models.dictionaries; print({'transformers', 'lightning'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
