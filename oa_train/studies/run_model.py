"""Finding the model of a run whose folder has moved."""

import warnings
from contextlib import suppress

from oa_train.artefacts import HEADER_FILE
from oa_train.errors import ArtefactError
from oa_train.files import read_json
from oa_train.models.moved_models import SIZES, Identity, find_moved, places
from oa_train.models.spec import LMSpec
from oa_train.studies.run_folder import FRONT, RunFolder

# Files in a run folder that hold the model's fingerprint.
_IDENTIFYING = (
    f"circuit/{HEADER_FILE}",
    f"constants/{HEADER_FILE}",
    f"{FRONT}/*/circuit/{HEADER_FILE}",
    "studies/*/results.json",
)


def located(run: RunFolder, spec: LMSpec) -> LMSpec:
    """The specification of a run's model whose path no longer exists, with the folder that now holds its weights.

    The folder is found by the fingerprint of the weights (see `models.moved_models`), and a warning names it.

    Raises:
        ArtefactError: the model was not found; the message lists the folders that were searched.
    """
    identity = _identity(run)
    moved = None if identity is None else find_moved(spec, identity, run.run)
    if moved is None:
        result = "The run has no results yet that identify its weights, so it was not searched for."
        if identity is not None:
            looked = ", ".join(map(str, places(run.run)))
            result = f"It was searched for by the fingerprint of its weights, up to two folders deep in {looked}."
        raise ArtefactError(
            f"{run.path} is of the model {spec.name}, which is not there. {result}\nSay where it is now, or where a "
            "copy is: --lm.name FOLDER (from Python `run.lm(FOLDER)`)."
        )
    warnings.warn(
        f"The model {spec.name} is not there; {moved.name} has the same weights and is used in its place.",
        stacklevel=3,
    )
    return moved


def _identity(run: RunFolder) -> Identity | None:
    """Fingerprint, family and sizes of the model, from an artefact or the results of a study; None without any."""
    for path in (path for pattern in _IDENTIFYING for path in sorted(run.run.glob(pattern))):
        with suppress(ArtefactError, AttributeError, TypeError):  # a damaged file says nothing
            content = read_json(path)
            header = content.get("header", {})
            model = header.get("provenance") or content.get("model", {})
            sizes = header.get("dimensions") or header
            if {"fingerprint", "family"} <= model.keys():
                known = {name: sizes[name] for name in SIZES if sizes.get(name)}
                return Identity(model["fingerprint"], model["family"], known)
    return None
