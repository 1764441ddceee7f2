"""Conversion of circuits and constants from layout 1, which had heads and MLPs only, to the current layout."""

from pathlib import Path
from typing import Any

from oa_train.ablations.constants import Constants, Slots
from oa_train.artefacts import (
    ARTEFACT_VERSION,
    FLOATS,
    HEADER_FILE,
    PROVENANCE,
    SIZE,
    Artefact,
    Schema,
    check_header,
    check_tensor,
    load_artefact,
    read_document,
)
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ArtefactError
from oa_train.models.graph import Graph
from oa_train.models.levels import Level
from oa_train.models.loading import load_config
from oa_train.models.parts import Dimensions
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec

OLD_VERSION = 1
_SIZES: Schema = {"n_layers": SIZE, "n_heads": SIZE, "provenance": PROVENANCE}
_HEADERS: dict[str, Schema] = {
    "nodes": _SIZES | {"nodes": [str]},
    "edges": _SIZES | {"edges": [str], "n_kv_heads": SIZE, "parallel": bool},
    "constants": {"bos_token_id": PROVENANCE["bos_token_id?"], "provenance": PROVENANCE},
}


def convert(old: Path, new: Path) -> Path:
    """Convert a circuit or constants of layout 1 into a new folder; the old folder stays as it is.

    Raises:
        ArtefactError: the old folder does not have that layout, or the new one exists.
        ModelError: the model, whose sizes are needed, cannot be loaded.
    """
    inside = sorted(str(path.parent) for path in old.glob(f"*/{HEADER_FILE}"))
    if inside and not (old / HEADER_FILE).exists():
        raise ArtefactError(
            f"{old} is the folder of a run. Convert the folders in it, each by itself: {', '.join(inside)}."
        )
    document = read_document(old, "circuit and no constants")
    if document.get("schema_version") == ARTEFACT_VERSION:
        raise ArtefactError(f"{old} is of the current layout already ({ARTEFACT_VERSION}); it needs no conversion.")
    kind = "constants" if document.get("kind") == "constants" else "circuit"
    artefact = load_artefact(old, kind, OLD_VERSION)
    header = artefact.header
    check_header(old, kind, header, _HEADERS["edges" if "edges" in header else "nodes" if kind == "circuit" else kind])
    if "model" not in header["provenance"]:
        raise ArtefactError(
            f"{old} does not name its model, whose sizes the current layout needs.\nMake it again from its "
            "names: Circuit(Nodes.of(model.config), names).save(NEW_FOLDER), or Graph.of for edges."
        )
    config = load_config(LMSpec(header["provenance"]["model"], header["provenance"].get("revision")))
    return (_circuit if kind == "circuit" else _constants)(old, artefact, config).save(new)


def _circuit(old: Path, content: Artefact, config: Any) -> Circuit:
    of_edges = "edges" in content.header
    level: Level = Graph.of(config) if of_edges else Nodes.of(config)
    return Circuit.from_file(old, level, content.header["edges" if of_edges else "nodes"], content)


def _constants(old: Path, content: Artefact, config: Any) -> Constants:
    sizes, tensors, header = Dimensions.of(config), content.tensors, content.header
    shapes = {
        "inputs": [1, None, sizes.d_model],
        "heads": [sizes.n_layers, None, sizes.n_heads, sizes.d_head],
        "mlps": [sizes.n_layers, None, sizes.d_model],
    }
    for name, shape in shapes.items():
        check_tensor(old, name, tensors.get(name), shape, *FLOATS)
    tables = {Site("embedding"): tensors["inputs"][0].unsqueeze(1)}
    for layer in range(sizes.n_layers):
        tables[Site("heads", layer)] = tensors["heads"][layer]
        tables[Site("mlp", layer)] = tensors["mlps"][layer].unsqueeze(1)
    provenance = {**header["provenance"], "bos_token_id": header["bos_token_id"]}
    return Constants(tables, Slots(tensors["heads"].shape[1]), provenance)
