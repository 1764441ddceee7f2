"""Reads files of sparse dictionaries, in the layouts of SAELens, sparsify and our own, as arguments of `Dictionary`.

Gated encoders, decoder norms that rescale a top-k code, and log thresholds are folded into the weights, which
changes the result by rounding only. Any other option that changes the code or its decoding is refused by name. Only
JSON and safetensors are read, so reading runs no code. Every reader raises `ArtefactError` if a file is missing or
damaged, or the variant is not supported.

A module's name (`layers.3.mlp`) stands for that module's output. In families with post-norms (Gemma 2, 3, OLMo 2) it
is normed before it is added to the residual stream, and differs from site `m3`, which is the tensor that is added.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from oa_train.errors import ArtefactError, nearest_names
from oa_train.shapes import Tensor

PLAIN_FILE = "dictionary.safetensors"
CONFIG_FILE = "cfg.json"
MOST_CONFIG_BYTES = 1 << 20

_HOOK = re.compile(r"blocks\.([0-9]{1,5})\.(.+)")
_HOOK_SITES = {"hook_resid_pre": "r", "hook_resid_post": "r", "hook_mlp_out": "m", "hook_attn_out": "a"}
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h)\.([0-9]{1,5})(?:\.(.+))?")
_MODULE_SITES = {"mlp": "m", "attention": "a", "self_attn": "a", "attn": "a"}
_HOOK_FORMS = (
    "blocks.N.hook_resid_pre, hook_resid_post, hook_mlp_out or hook_attn_out; layers.N, layers.N.mlp or .attn"
)

# Architectures of SAELens: their tensors besides W_enc, W_dec and b_dec, and the activation in our terms.
_ARCHITECTURES = {
    "standard": (("b_enc",), "relu"),
    "topk": (("b_enc",), "topk"),
    "jumprelu": (("b_enc", "threshold"), "jumprelu"),
    "gated": (("b_gate", "b_mag", "r_mag"), "jumprelu"),
}
# Settings that change the code or its decoding, each with the supported values; the first is the default.
_SAE_LENS_SETTINGS: dict[str, tuple[object, ...]] = {
    "signed": (False,),
    "normalize_activations": ("none", False),
    "normalize_decoder": (False,),
    "reshape_activations": ("none",),
    "hook_head_index": (None,),
    "apply_b_dec_to_input": (True, False),
    "rescale_acts_by_decoder_norm": (False, True),
    "center_writing_weights": (False, True),
}
_SPARSIFY_SETTINGS: dict[str, tuple[object, ...]] = dict.fromkeys(("transcode", "gram_lookup", "signed"), (False,))
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_TRANSCODER = "A transcoder writes elsewhere than it reads; a dictionary does both at one site."
_REASONS = {
    "normalize_activations": "layer_norm and constant_norm_rescale decode with a scale of each token. The scale of "
    "the others is not in these files: SAELens folds it in after training (`fold_activation_norm_scaling_factor`).",
    "hook_name_out": _TRANSCODER,
    "transcode": _TRANSCODER,
}


def refuse(where: str, problem: str, expected: str) -> NoReturn:
    """Raise an `ArtefactError` for a dictionary that cannot be used."""
    raise ArtefactError(f"{where} {problem}.\n{expected}")


def site_of_hook(hook: str, where: str) -> str | None:
    """Translate a TransformerLens hook or the name of a module into a site; None if it names no layer.

    Raises:
        ArtefactError: the name is that of a place in a layer that is not a site.
    """
    match, sites = _HOOK.fullmatch(hook), _HOOK_SITES
    if match is None:
        match, sites = _MODULE.fullmatch(hook), _MODULE_SITES
    if match is None:
        return None
    layer, place = int(match[1]), match[2]
    if place is None or place == "hook_resid_post":
        return f"r{layer + 1}"
    if place not in sites:
        hint = f"{nearest_names(place, sites)} Sites: {_HOOK_FORMS}."
        refuse(where, f"reads at {hook!r}, which is not a site", hint)
    return f"{sites[place]}{layer}"


def read_sae_lens(weights: Path) -> dict[str, Any]:
    """Arguments of `Dictionary` from the files of SAELens, including versions before 6."""
    where, config = str(weights.parent), _read_config(weights.parent)
    stored = [*_as_object(where, "metadata", config).items(), *config.items()]
    config = {_OLD_NAMES.get(name, name): value for name, value in stored if value is not None}
    for name in ("activation_fn_kwargs", "model_from_pretrained_kwargs"):
        config = _as_object(where, name, config) | config
    architecture, function = config.get("architecture", "standard"), config.get("activation_fn", "relu")
    if architecture == "standard" and function == "topk":
        architecture = "topk"
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        refuse(where, f"has the architecture {architecture!r}", nearest_names(str(architecture), _ARCHITECTURES))
    hook, (others, activation) = config.get("hook_name"), _ARCHITECTURES[architecture]
    _check_setting(where, "activation_fn", function, ("relu", "topk") if architecture == "topk" else ("relu",))
    _check_setting(where, "hook_name_out", config.get("hook_name_out"), (None, hook))
    settings = _checked_settings(where, config, _SAE_LENS_SETTINGS)

    scales = ("scaling_factor", "finetuning_scaling_factor")
    tensors, _ = _read_tensors(weights, ("W_enc", "W_dec", "b_dec", *others), scales, {"log_threshold": "threshold"})
    for name in scales:
        if name in tensors and not tensors[name].eq(1).all():
            refuse(where, f"has a {name} other than 1", "Expected none: fold it into W_dec and save again.")
    w_enc, w_dec, b_enc, threshold = tensors["W_enc"], tensors["W_dec"], tensors.get("b_enc"), tensors.get("threshold")
    _check_size(where, w_enc.shape, (config.get("d_in"), config.get("d_sae")))
    for name, tensor in tensors.items():  # checked before they are combined; `Dictionary` checks the rest
        expected = w_enc.shape[::-1] if name == "W_dec" else w_enc.shape[1:]
        if name in ("W_dec", "b_mag", "b_gate", "r_mag") and tensor.shape != expected:
            refuse(where, f"has {name} of shape {list(tensor.shape)}", f"Expected {list(expected)}.")
    if architecture == "gated":
        # Gate and magnitude share their weights, so the gate is a threshold on the magnitude:
        # x W + b_gate > 0 where exp(r_mag) x W + b_mag > b_mag - exp(r_mag) b_gate.
        scale = tensors["r_mag"].exp()
        w_enc, b_enc, threshold = w_enc * scale, tensors["b_mag"], tensors["b_mag"] - scale * tensors["b_gate"]
    if settings["rescale_acts_by_decoder_norm"] and architecture == "topk" and b_enc is not None:
        norms = w_dec.norm(dim=-1).clamp_min(1e-8)
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    site = None if hook is None else site_of_hook(str(hook), where)
    if hook is not None and site is None:
        refuse(where, f"reads at {hook!r}, which is not a site", f"Expected {_HOOK_FORMS}.")
    return {
        "site": site,
        "w_enc": w_enc,
        "b_enc": b_enc,
        "w_dec": w_dec,
        "b_dec": tensors["b_dec"],
        "activation": activation,
        "threshold": threshold,
        "k": config.get("k") if architecture == "topk" else None,
        "subtracts_decoder_bias": bool(settings["apply_b_dec_to_input"]),
        "centres_input": bool(settings["center_writing_weights"]),
    }


def read_sparsify(weights: Path) -> dict[str, Any]:
    """Arguments of `Dictionary` from the files of sparsify, whose folder has the name of the module that it reads."""
    folder = weights.parent
    where, config = str(folder), _read_config(folder)
    _checked_settings(where, config, _SPARSIFY_SETTINGS)
    # A skip connection reads x itself, so changes of the code do not change its output.
    tensors, _ = _read_tensors(weights, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), ("W_skip",))
    _check_size(where, tensors["encoder.weight"].shape, (config.get("num_latents") or None, config.get("d_in")))
    module = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    return {
        "site": site_of_hook(module.name, where),
        "w_enc": tensors["encoder.weight"].mT.contiguous(),
        "b_enc": tensors["encoder.bias"],
        "w_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
        "activation": config.get("activation", "topk"),
        "k": config.get("k"),
        "subtracts_decoder_bias": True,
    }


def read_plain(weights: Path) -> dict[str, Any]:
    """Arguments of `Dictionary` from one file, whose header's metadata holds the settings."""
    capitals = {"W_enc": "w_enc", "W_dec": "w_dec"}
    tensors, settings = _read_tensors(weights, ("w_enc", "b_enc", "w_dec", "b_dec"), ("threshold",), capitals)
    default = "jumprelu" if "threshold" in tensors else "topk" if "k" in settings else "relu"
    values: dict[str, Any] = {
        "site": settings.get("site"),
        "activation": settings.get("activation", default),
        **tensors,
    }
    if "k" in settings:
        k = settings["k"]
        values["k"] = int(k) if k.isdecimal() and len(k) < 10 else k[:60]
    for name in ("subtracts_decoder_bias", "centres_input"):
        _check_setting(str(weights), name, settings.get(name, "false"), ("true", "false"))
        values[name] = settings.get(name) == "true"
    return values


DICTIONARY_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sae_weights.safetensors": read_sae_lens,
    "sae.safetensors": read_sparsify,
    PLAIN_FILE: read_plain,
}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            refuse(str(path), "is too long for settings", f"Expected at most {MOST_CONFIG_BYTES} bytes of JSON.")
        config = json.loads(path.read_bytes())
    except OSError as problem:
        raise ArtefactError(f"{path} cannot be read: {problem}.\nExpected it next to the weights.") from problem
    except (ValueError, RecursionError) as problem:
        raise ArtefactError(f"{path} is not JSON: {problem}.\nDownload or export it again.") from problem
    if not isinstance(config, dict):
        refuse(str(path), f"holds a {type(config).__name__}", "Expected a JSON object; download or export it again.")
    return config


def _read_tensors(
    path: Path, required: Collection[str], optional: Collection[str] = (), other_names: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, all in their widest dtype and at least float32, and the metadata of the file's header."""
    other_names = other_names or {}
    known = [*required, *optional, *(name for name, usual in other_names.items() if usual in required)]
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
            for name in names:
                if name not in known:
                    refuse(str(path), f"has a tensor {name!r}, which is not supported", nearest_names(name, known))
            stored = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as problem:
        raise ArtefactError(f"{path} is damaged: {problem}.\nDownload or export it again.") from problem
    for name, tensor in stored.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            refuse(str(path), f"has {name!r} in {tensor.dtype}", "Expected floating-point numbers of 16 to 64 bits.")
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in stored.values()), torch.float32)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        usual = other_names.get(name, name)
        if usual in tensors:
            refuse(str(path), f"has both {usual!r} and {name!r}", "Expected one of them.")
        tensors[usual] = tensor.to(dtype).exp() if name.startswith("log_") else tensor.to(dtype)
    missing = [name for name in required if name not in tensors]
    if missing:
        expected = f"Expected {', '.join(required)}; it holds {', '.join(names)}."
        refuse(str(path), f"has no {', '.join(missing)}", expected)
    return tensors, metadata


def _as_object(where: str, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        refuse(where, f"has {name} {value!r}", "Expected a JSON object.")
    return value


def _checked_settings(
    where: str, config: Mapping[str, Any], supported: Mapping[str, tuple[object, ...]]
) -> dict[str, Any]:
    """The settings named in a table of supported values, from a configuration or by default."""
    settings = {name: config.get(name, values[0]) for name, values in supported.items()}
    for name, value in settings.items():
        _check_setting(where, name, value, supported[name])
    return settings


def _check_setting(where: str, name: str, value: object, supported: Collection[object]) -> None:
    if value not in supported:
        expected = f"Supported: {' or '.join(map(repr, supported))}. {_REASONS.get(name, '')}"
        refuse(where, f"has {name} {value!r}, which is not supported", expected.strip())


def _check_size(where: str, shape: Collection[int], stated: Collection[object]) -> None:
    if len(shape) != len(stated) or any(size not in (None, width) for size, width in zip(stated, shape, strict=True)):
        refuse(
            where,
            f"has an encoder of shape {list(shape)}, where {CONFIG_FILE} says {list(stated)}",
            "Weights and settings are not of one dictionary; download or export both again.",
        )
