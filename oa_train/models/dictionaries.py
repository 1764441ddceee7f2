"""Sparse dictionaries (sparse autoencoders): an encoder and a decoder at a site.

Three layouts are read, recognised by the name of the weights file:

    sae_weights.safetensors + cfg.json   SAELens; the hook name in cfg.json is the site
    sae.safetensors + cfg.json           sparsify; the folder's name (`layers.3.mlp`) is the site
    dictionary.safetensors               plain, what `save_dictionary` writes; any other .safetensors file likewise

`models.dictionary_layouts` translates them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from oa_train.artefacts import FLOATS, tensor_bytes
from oa_train.errors import ArtefactError, nearest_names
from oa_train.files import write_folder
from oa_train.models.builtin import builtin_folders
from oa_train.models.dictionary_layouts import DICTIONARY_READERS, PLAIN_FILE, read_plain, refuse
from oa_train.shapes import Float, Tensor

Activation = Literal["identity", "relu", "jumprelu", "topk", "groupmax"]

SITE_FORMS = "r3 (what enters block 3), m3 (what MLP 3 adds) or a3 (what attention 3 adds)"
_SITE = re.compile(r"[rma](0|[1-9][0-9]{0,5})")
_TENSORS = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
_SETTINGS = ("site", "activation", "k", "subtracts_decoder_bias", "centres_input")


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder of the tensor at a site; the entries of its code are features.

    Attributes:
        site: `r3` is the input of block 3 (`r{L}` that of the final norm), `m3` and `a3` the outputs of MLP 3 and
            attention 3.
        w_enc: encoder weights.
        b_enc: encoder biases.
        w_dec: direction that each feature adds at the site.
        b_dec: decoder bias.
        activation: function from pre-activations to the code. `jumprelu` keeps those above 0 and the threshold; `topk`
            the k largest, if positive; `groupmax` the largest of each of k equal groups, if positive.
        threshold: threshold of `jumprelu` for each feature.
        k: number of features kept by `topk`, or of groups for `groupmax`.
        subtracts_decoder_bias: True if the encoder reads x - b_dec.
        centres_input: True if the encoder reads x minus its mean over d_model, because it was trained on a
            TransformerLens model with `center_writing_weights`.
        path: file from which it was read.

    Raises:
        ArtefactError: the tensors and settings are inconsistent, or a number is not finite.
    """

    site: str
    w_enc: Float[Tensor, "d_model feature"]
    b_enc: Float[Tensor, " feature"]
    w_dec: Float[Tensor, "feature d_model"]
    b_dec: Float[Tensor, " d_model"]
    activation: Activation
    threshold: Float[Tensor, " feature"] | None = None
    k: int | None = None
    subtracts_decoder_bias: bool = False
    centres_input: bool = False
    path: str = ""

    def __post_init__(self) -> None:
        check_dictionary(self.path or "The dictionary", vars(self))

    @property
    def n_features(self) -> int:
        """Number of entries of the code."""
        return self.w_enc.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the site."""
        return self.w_enc.shape[0]

    @property
    def layer(self) -> int:
        """Index in the site's name; for `r3` that of the block which reads the tensor."""
        return int(self.site[1:])

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 of site, settings and weights, for any device and any wider dtype."""
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for name, tensor in self._tensors().items():
            digest.update(f"{name}{list(tensor.shape)}".encode())
            for part in tensor.detach().flatten().split(1 << 22):
                digest.update(part.to("cpu", torch.float64).numpy().tobytes())
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dictionary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def _copies(self) -> dict[tuple[torch.device, torch.dtype], "Dictionary"]:
        return {}

    def like(self, x: Tensor) -> "Dictionary":
        """This dictionary on the device of x, in the dtype in which x is encoded; copies are made once and cached."""
        where = x.device, torch.promote_types(x.dtype, torch.float32)
        if where == (self.w_enc.device, self.w_enc.dtype):
            return self
        if where not in self._copies:
            self._copies[where] = self.to(*where)
        return self._copies[where]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        """The code of x, in at least float32, even under autocast."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            if self.centres_input:
                x = x - x.mean(-1, keepdim=True)
            if self.subtracts_decoder_bias:
                x = x - self.b_dec.to(dtype)
            code = x @ self.w_enc.to(dtype) + self.b_enc.to(dtype)
        if self.threshold is not None:
            return code.where(code > self.threshold.to(dtype).clamp_min(0), 0.0)
        if self.activation == "identity":
            return code
        code = code.relu()
        if self.k is None:
            return code
        if self.activation == "groupmax":
            groups = code.unflatten(-1, (self.k, -1))
            largest = groups.max(-1, keepdim=True)
            return torch.zeros_like(groups).scatter(-1, largest.indices, largest.values).flatten(-2)
        largest = code.topk(self.k, -1, sorted=False)
        return torch.zeros_like(code).scatter(-1, largest.indices, largest.values)

    def decode_change(self, change: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch d_model"]:
        """Change of the site's tensor that corresponds to a change of the code, in at least float32."""
        dtype = torch.promote_types(change.dtype, torch.float32)
        with torch.autocast(change.device.type, enabled=False):
            return change.to(dtype) @ self.w_dec.to(dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Dictionary":
        """Copy to a device, and convert to a dtype unless it is None."""
        moved: dict[str, Any] = {name: tensor.to(device, dtype) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    def _settings(self) -> dict[str, str | int | bool]:
        return {name: getattr(self, name) for name in _SETTINGS if getattr(self, name) is not None}


@dataclass(frozen=True)
class DictionarySpec:
    """A sparse dictionary as a configuration names it; the arguments of `load_dictionary`.

    Attributes:
        path: its folder or weights file, or the name of a built-in one (`tiny_r2`).
        site: site at which it reads, for files that do not name it; otherwise it must agree with them.
        centres_input: overrides the value in the files; see `load_dictionary`.
    """

    path: str
    site: str | None = None
    centres_input: bool | None = None

    def load(self) -> Dictionary:
        """Read it with `load_dictionary`."""
        return load_dictionary(self.path, self.site, self.centres_input)


def reload_dictionary(header: Mapping[str, Any]) -> Dictionary:
    """Reload a dictionary by the path, site, `centres_input` and fingerprint that an artefact's header names.

    Raises:
        ArtefactError: the dictionary is missing, or its content has changed.
    """
    dictionary = load_dictionary(header["path"], header["site"], header["centres_input"])
    if dictionary.fingerprint != header["fingerprint"]:
        raise ArtefactError(
            f"The dictionary at {header['path']} has changed (fingerprint {dictionary.fingerprint}, expected "
            f"{header['fingerprint']}). Restore the one that was used."
        )
    return dictionary


def check_dictionary(where: str, values: Mapping[str, Any]) -> None:
    """Check that arguments of `Dictionary` are consistent; messages call the dictionary `where`.

    Raises:
        ArtefactError: they are not, or a number is not finite.
    """
    site, activation, k = values["site"], values["activation"], values.get("k")
    if not _SITE.fullmatch(site):
        refuse(where, f"reads at {site!r}, which is not a site of dictionaries", f"Expected {SITE_FORMS}.")
    if activation not in get_args(Activation):
        refuse(where, f"has activation {activation!r}", nearest_names(str(activation), get_args(Activation)))
    if (values.get("threshold") is not None) != (activation == "jumprelu"):
        state = "no threshold" if activation == "jumprelu" else "a threshold"
        refuse(where, f"has {state} with {activation}", "Expected a threshold with jumprelu and only there.")
    if (k is not None) != (activation in ("topk", "groupmax")):
        refuse(where, f"has k {k!r} with {activation}", "Expected k with topk and groupmax and only there.")
    shape = list(values["w_enc"].shape)
    d_model, n_features = shape if len(shape) == 2 and 0 not in shape else (-1, -1)
    shapes = {"w_enc": [d_model, n_features], "w_dec": [n_features, d_model], "b_dec": [d_model]}
    tensors = {name: values[name] for name in _TENSORS if values.get(name) is not None}
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes.get(name, [n_features]):
            refuse(
                where,
                f"has {name} of shape {list(tensor.shape)} with w_enc of shape {shape}",
                "Expected w_enc [d_model, feature], w_dec [feature, d_model], b_dec [d_model] and others [feature].",
            )
        if tensor.dtype not in FLOATS:
            refuse(where, f"has {name} in {tensor.dtype}", "Expected floating-point numbers of 16 to 64 bits.")
        if not tensor.isfinite().all():
            refuse(where, f"has NaN or infinite numbers in {name}", "Download or export it again.")
    if k is not None and not (type(k) is int and 1 <= k <= n_features):
        refuse(where, f"has k {k!r}", f"Expected 1 to {n_features}, its number of features.")
    if k is not None and activation == "groupmax" and n_features % k:
        refuse(where, f"has {n_features} features in {k} groups", "Expected groups of equal size.")


def load_dictionary(
    folder_or_file: str | Path, site: str | None = None, centres_input: bool | None = None
) -> Dictionary:
    """Read a dictionary in one of the three layouts, onto the CPU and in at least float32.

    Args:
        folder_or_file: its folder or weights file, or the name of a built-in one.
        site: site at which it reads, for files that do not name it; otherwise it must agree with them.
        centres_input: overrides the value in the files. SAELens did not store it before September 2024; its
            `gpt2-small-res-jb` dictionaries need True.

    Raises:
        ArtefactError: the layout is unknown, a file is missing or damaged, the variant is not supported, or the site
            is unknown or contradicted.
    """
    built_in = builtin_folders(PLAIN_FILE).get(str(folder_or_file))
    path = built_in or Path(folder_or_file).expanduser().absolute()
    weights = _weights_file(path)
    values = DICTIONARY_READERS.get(weights.name, read_plain)(weights)
    stated = values.pop("site")
    if stated is not None and site is not None and stated != site:
        refuse(str(path), f"reads at {stated}, not at {site}", f"Expected no site, or {stated}.")
    site = stated if site is None else site
    if site is None:
        refuse(str(path), "does not say where it reads", f"Name its site: {SITE_FORMS}.")
    if centres_input is not None:
        values["centres_input"] = centres_input
    values |= {"site": site, "path": str(weights)}
    check_dictionary(str(path), values)  # before a run-time type checker does, with less helpful errors
    return Dictionary(**values)


def _weights_file(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    known = [path / name for name in DICTIONARY_READERS if (path / name).is_file()]
    if len(known) == 1:
        return known[0]
    state, content, advice = "does not exist", "", ""
    if path.exists():
        names = sorted(child.name for child in path.iterdir()) if path.is_dir() else [path.name]
        state = "is not a dictionary of a known layout"
        content = f"It holds {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}. " if path.is_dir() else ""
        if any(name.endswith((".pt", ".pth", ".bin", ".pkl", ".npz")) for name in names):
            advice = " Pickles and .npz files are not read: export their tensors with safetensors."
    raise ArtefactError(
        f"{path} {state}.\n{content}Expected a .safetensors file, or a folder with exactly one of "
        f"{', '.join(DICTIONARY_READERS)}.{advice}"
    )


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> Path:
    """Write a dictionary in the plain layout to a new folder by `write_folder`, and return the folder."""
    folder = Path(folder)
    settings = {name: v if isinstance(v, str) else json.dumps(v) for name, v in dictionary._settings().items()}
    write_folder(folder, {PLAIN_FILE: tensor_bytes(dictionary._tensors(), settings)})
    return folder
