"""Result folders: a JSON header, tensors as safetensors, and where they come from.

    circuit/
        artefact.json        kind, schema version, header, provenance, checksums of header and tensors
        tensors.safetensors

A folder is written whole or not at all (temporary name, sync, rename), is never overwritten, and is checked against
its checksum when it is read. Reading runs no code.
"""

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from oa_train.errors import ArtefactError, RunError
from oa_train.files import sync_folder, write_synced
from oa_train.shapes import Tensor

# Version of circuits and constants. Version 1 named the components of heads and MLPs alone.
ARTEFACT_VERSION = 2
HEADER_FILE = "artefact.json"
TENSOR_FILE = "tensors.safetensors"
_RECORDED_PACKAGES = ("oa_train", "torch", "lightning", "transformers")


@dataclass(frozen=True, eq=False)
class Artefact:
    """What a result folder holds.

    Attributes:
        header: plain data that describes the result.
        tensors: its numbers, by name.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def versions() -> dict[str, str]:
    """Versions of python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree that was never installed
            continue
    return found


def save_artefact(folder: str | Path, kind: str, artefact: Artefact) -> Path:
    """Write a result folder.

    Args:
        folder: where; its parent is made.
        kind: what the folder holds ("circuit", "constants").
        artefact: the content.

    Returns:
        The folder.

    Raises:
        ArtefactError: the folder exists already.
        RunError: it cannot be written; nothing of it is left behind.
    """
    folder = Path(folder)
    if folder.exists():
        raise ArtefactError(f"{folder} exists already and results are never overwritten; name another folder.")
    # Copies, because safetensors refuses tensors that share memory.
    blob = save_safetensors({name: t.detach().cpu().clone().contiguous() for name, t in artefact.tensors.items()})
    document = {
        "kind": kind,
        "schema_version": ARTEFACT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        "header_sha256": _header_checksum(artefact.header),
        "header": artefact.header,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            temporary.chmod(0o755)
            write_synced(temporary / TENSOR_FILE, blob)
            write_synced(temporary / HEADER_FILE, json.dumps(document, indent=2, allow_nan=False).encode())
            temporary.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as problem:
        raise RunError(f"{folder} cannot be written: {problem.strerror or problem}.") from problem
    return folder


def load_artefact(folder: str | Path, kind: str, layout: int = ARTEFACT_VERSION) -> Artefact:
    """Read a result folder.

    Args:
        folder: where.
        kind: what it must hold.
        layout: version of the layout in which it must be.

    Raises:
        ArtefactError: the folder is missing, damaged, of another kind, or from a newer version.
    """
    folder = Path(folder)
    document = _read_header(folder, kind, layout)
    try:
        if _header_checksum(document["header"]) != document["header_sha256"]:
            raise ArtefactError(
                f"{folder / HEADER_FILE} is damaged or was edited: its header's checksum is not the one beside it."
            )
        blob = (folder / TENSOR_FILE).read_bytes()
        if hashlib.sha256(blob).hexdigest() != document["tensors_sha256"]:
            raise ArtefactError(f"{folder / TENSOR_FILE} is damaged: its checksum is not the one in {HEADER_FILE}.")
        return Artefact(document["header"], load_safetensors(blob))
    except (OSError, KeyError, SafetensorError) as problem:
        raise ArtefactError(f"{folder} is damaged: {type(problem).__name__}: {problem}") from problem


def _header_checksum(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _read_header(folder: Path, kind: str, layout: int) -> dict[str, Any]:
    path = folder / HEADER_FILE
    try:
        document = json.loads(path.read_bytes())
    except OSError as problem:
        raise ArtefactError(f"There is no {kind} at {folder}: {HEADER_FILE} cannot be read ({problem}).") from problem
    except ValueError as problem:
        raise ArtefactError(f"{path} is damaged: it is not JSON ({problem}).") from problem
    if not isinstance(document, dict) or document.get("kind") != kind:
        given = document.get("kind") if isinstance(document, dict) else type(document).__name__
        raise ArtefactError(f"{folder} holds {given!r}; expected {kind!r}.")
    if not isinstance(document.get("header"), dict):
        raise ArtefactError(f"{path} is damaged: its header is not a JSON object, so this is not a {kind}.")
    version = document.get("schema_version")
    if layout == ARTEFACT_VERSION and isinstance(version, int) and 0 < version < ARTEFACT_VERSION:
        raise ArtefactError(
            f"{folder} was written by an earlier version of oa_train (layout {version}; this version reads "
            f"{ARTEFACT_VERSION}). Convert it:\n  oa-train convert {folder} NEW_FOLDER"
        )
    if version != layout:
        raise ArtefactError(
            f"{folder} has schema version {version}; expected {layout}. Was it written by a newer oa_train?"
        )
    return document
