"""Circuits and constants of the first layout, which knew heads and MLPs alone, turned into today's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oa_train.ablations.constants import Constants, Slots
from oa_train.artefacts import HEADER_FILE, load_artefact
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ArtefactError
from oa_train.models.families import Dimensions
from oa_train.models.graph import Graph
from oa_train.models.levels import Level
from oa_train.models.loading import LMSpec, load_config
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from oa_train.shapes import Tensor

OLD_VERSION = 1


def convert(old: Path, new: Path) -> Path:
    """Write a circuit or constants of the first layout anew; the old folder stays as it is.

    Args:
        old: folder of a circuit or of constants.
        new: folder that is made.

    Raises:
        ArtefactError: the old folder is not of that layout, or the new one exists.
        ModelError: the model whose sizes are needed cannot be reached.
    """
    kind = _kind(old)
    artefact = load_artefact(old, kind, OLD_VERSION)
    try:
        if kind == "circuit":
            return _circuit(artefact.header, artefact.tensors).save(new)
        return _constants(artefact.header, artefact.tensors).save(new)
    except (KeyError, TypeError) as problem:
        raise ArtefactError(f"{old} is no {kind} of the first layout: {problem} is missing.") from problem


def _kind(folder: Path) -> str:
    """Circuit or constants, as the header says; `load_artefact` tells what is wrong where it says neither."""
    try:
        document = json.loads((folder / HEADER_FILE).read_bytes())
    except (OSError, ValueError):
        return "circuit"
    kind = document.get("kind") if isinstance(document, dict) else None
    return kind if kind in ("circuit", "constants") else "circuit"


def _config(provenance: Mapping[str, Any]) -> Any:
    return load_config(LMSpec(provenance["model"], provenance["revision"]))


def _circuit(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Circuit:
    config = _config(header["provenance"])
    level: Level = Graph.of(config) if "edges" in header else Nodes.of(config)
    names = tuple(header["edges" if "edges" in header else "nodes"])
    return Circuit(level, names, tensors.get("scores"), header["provenance"])


def _constants(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Constants:
    n_layers, n_positions = tensors["heads"].shape[:2]
    if n_layers != Dimensions.of(_config(header["provenance"])).n_layers:
        raise ArtefactError("The constants have another number of layers than the model that they name.")
    tables = {Site("embedding"): tensors["inputs"][0].unsqueeze(1)}
    for layer in range(n_layers):
        tables[Site("heads", layer)] = tensors["heads"][layer]
        tables[Site("mlp", layer)] = tensors["mlps"][layer].unsqueeze(1)
    provenance = {**header["provenance"], "bos_token_id": header["bos_token_id"]}
    return Constants(tables, Slots(n_positions), provenance)
