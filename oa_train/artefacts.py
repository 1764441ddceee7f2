"""Artefacts: result folders with a JSON header, provenance included, and tensors in safetensors.

    circuit/
        artefact.json        kind, schema version, header, provenance, checksums of header and tensors
        tensors.safetensors

A folder is written whole or not at all and never overwritten. Reading runs no code and checks the checksums, and the
type, size and shape of every value.
"""

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors, save as save_safetensors

from oa_train.errors import ArtefactError
from oa_train.files import write_folder
from oa_train.shapes import Tensor

# Schema version of circuits and constants. Version 1 had heads and MLPs only.
ARTEFACT_VERSION = 2
HEADER_FILE = "artefact.json"
TENSOR_FILE = "tensors.safetensors"
MOST_HEADER_BYTES = 1 << 28  # room for the names of ten million kept neurons
_RECORDED_PACKAGES = ("oa_train", "torch", "lightning", "transformers")

# Schema of a value read from a file: a type (`object` for any value); a range of integers; [schema] for a list; a
# tuple of alternatives; or a dict by key, where "key?" may be missing and `str` means all keys that are not named.
Schema = Any
COUNT = range(1 << 53)
SIZE = range(1, 1 << 31)
FREE: Schema = {str: object}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

PROVENANCE: Schema = {
    "model?": str,
    "revision?": (str, None),
    "family?": str,
    "fingerprint?": str,
    "task?": FREE,
    "bos_token_id?": (range(1 << 31), None),
    "seed?": int,
    "ablation?": str,
    "loss?": str,
    "selected?": [str],
    "training?": {"positions?": SIZE, str: object},
    "edges_before_removal?": COUNT,
    str: object,
}


def mismatch(value: object, schema: Schema, name: str) -> str | None:
    """First mismatch between a value read from a file and its schema, in words; None if it matches."""
    inner: Iterable[tuple[object, Schema, str]]
    if isinstance(schema, dict) and isinstance(value, dict):
        schemas = {key.rstrip("?"): inner for key, inner in schema.items() if key is not str}
        for key in schema:
            if key is not str and not key.endswith("?") and key not in value:
                return f"{name} lacks {key}"
        for key in value:
            if not isinstance(key, str) or (key not in schemas and str not in schema):
                return f"{name} has {_brief(key)}, which is unknown"
        inner = ((item, schemas.get(key, schema.get(str)), f"{name}.{key}") for key, item in value.items())
        return next(filter(None, starmap(mismatch, inner)), None)
    if isinstance(schema, list) and isinstance(value, list | tuple):
        inner = ((item, schema[0], f"an entry of {name}") for item in value)
        return next(filter(None, starmap(mismatch, inner)), None)
    if isinstance(schema, tuple):
        problems = [mismatch(value, choice, name) for choice in schema]
        return None if None in problems else problems[0]
    if isinstance(schema, range) and type(value) is int and value in schema:
        return None
    if schema is object or value is schema or (isinstance(schema, type) and type(value) is schema):
        return None
    kinds: dict[type, str] = {dict: "an object", list: "a list", range: f"an integer in {schema}"}
    expected = kinds.get(type(schema)) or str(getattr(schema, "__name__", "null"))
    return f"{name} is {_brief(value)}; expected {expected}"


def _brief(value: object) -> str:
    return type(value).__name__ if isinstance(value, dict | list | Tensor) else repr(value)[:60]


def check_tensor(
    where: object, name: str, tensor: Tensor | None, shape: Sequence[int | None], *dtypes: torch.dtype
) -> None:
    """Check a tensor read from a file; None in `shape` means any size.

    Raises:
        ArtefactError: the tensor is missing, has another shape or dtype, or is not finite.
    """
    if tensor is None:
        raise ArtefactError(f"{where} is damaged: it has no tensor {name!r}.")
    fits = len(tensor.shape) == len(shape) and all(e in (None, n) for n, e in zip(tensor.shape, shape, strict=True))
    if not fits or tensor.dtype not in dtypes:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ArtefactError(
            f"{where} contradicts itself: {name} is {tensor.dtype} of shape {list(tensor.shape)}; expected "
            f"{' or '.join(map(str, dtypes))} of shape [{sizes}]."
        )
    if not tensor.isfinite().all():
        raise ArtefactError(f"{where} is damaged: {name} holds NaN or infinite numbers.")


@dataclass(frozen=True, eq=False)
class Artefact:
    """Content of a result folder: a header of plain data that describes the result, and its tensors by name."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages on which results depend."""
    known = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:  # a source tree that was never installed
            continue
    return known


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file; copied first, because it cannot hold tensors that share memory."""
    return save_safetensors({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, metadata)


def save_artefact(folder: str | Path, kind: str, artefact: Artefact) -> Path:
    """Write a result folder of a kind (`circuit`, `constants`) by `write_folder`, and return it."""
    folder = Path(folder)
    blob = tensor_bytes(artefact.tensors)
    document = {
        "kind": kind,
        "schema_version": ARTEFACT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        "header_sha256": _header_checksum(artefact.header),
        "header": artefact.header,
    }
    header = json.dumps(document, indent=2, allow_nan=False).encode()
    write_folder(folder, {TENSOR_FILE: blob, HEADER_FILE: header})
    return folder


def check_header(folder: object, kind: str, header: object, schema: Schema) -> None:
    """Check the header of a result folder of a kind against a schema; raises `ArtefactError` where they differ."""
    problem = mismatch(header, schema, "its header")
    if problem is not None:
        article = "" if kind.endswith("s") else "a "
        raise ArtefactError(f"{folder} is not {article}{kind} of this version: {problem}.")


def load_artefact(folder: str | Path, kind: str, layout: int = ARTEFACT_VERSION) -> Artefact:
    """Read a result folder of a kind and schema version; the contents of its header are left to `check_header`.

    Raises:
        ArtefactError: the folder is missing, damaged, or of another kind or version.
    """
    folder = Path(folder)
    document = read_document(folder, kind)
    _check_document(folder, document, kind, layout)
    header, path = document["header"], folder / HEADER_FILE
    try:
        if _header_checksum(header) != document.get("header_sha256"):
            raise ArtefactError(f"{path} is damaged or was edited: the header does not match its checksum.")
        blob = (folder / TENSOR_FILE).read_bytes()
        if hashlib.sha256(blob).hexdigest() != document.get("tensors_sha256"):
            raise ArtefactError(
                f"{folder / TENSOR_FILE} is damaged: its checksum is not that of {path.name} (tensors_sha256)."
            )
        return Artefact(header, load_safetensors(blob))
    except (OSError, SafetensorError, RecursionError) as problem:
        raise ArtefactError(f"{folder} is damaged: {type(problem).__name__}: {problem}") from problem


def _header_checksum(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_document(folder: Path, kind: str) -> dict[str, Any]:
    """The parsed header file of a result folder, of any kind and version; messages call it a `kind`.

    Raises:
        ArtefactError: the file is missing, or not a JSON object whose numbers are finite.
    """
    path = folder / HEADER_FILE
    try:
        if path.stat().st_size > MOST_HEADER_BYTES:
            raise ValueError(f"it is too long; expected at most {MOST_HEADER_BYTES} bytes")
        document = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except OSError as problem:
        raise ArtefactError(f"There is no {kind} at {folder}: {HEADER_FILE} cannot be read ({problem}).") from problem
    except (ValueError, RecursionError) as problem:
        raise ArtefactError(f"{path} is damaged: it is not JSON ({problem}).") from problem
    if not isinstance(document, dict):
        raise ArtefactError(f"{folder} holds {type(document).__name__!r}; expected {kind!r}.")
    return document


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:60]} is not a JSON number")
    return number


def _check_document(folder: Path, document: Mapping[str, Any], kind: str, layout: int) -> None:
    if document.get("kind") != kind:
        raise ArtefactError(f"{folder} holds {_brief(document.get('kind'))}; expected {kind!r}.")
    if not isinstance(document.get("header"), dict):
        raise ArtefactError(f"{folder / HEADER_FILE} is damaged: its header is not a JSON object.")
    version = document.get("schema_version")
    if layout == ARTEFACT_VERSION and type(version) is int and 0 < version < ARTEFACT_VERSION:
        raise ArtefactError(
            f"{folder} was written by an earlier version of oa_train (layout {version}; this version reads "
            f"{ARTEFACT_VERSION}). Convert it:\n  oa-train convert {folder} NEW_FOLDER"
        )
    if version != layout:
        raise ArtefactError(
            f"{folder} has schema version {_brief(version)}; expected {layout}. Was it written by a newer oa_train?"
        )
