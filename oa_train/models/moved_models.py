"""Finds a local model that has been moved, by its fingerprint, in a few folders."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from oa_train.errors import OaTrainError
from oa_train.models.gguf import cache_folder
from oa_train.models.loading import load_config, load_model
from oa_train.models.spec import LMSpec
from oa_train.models.weights import fingerprint

# Number of folders above a run that are searched: its experiment, the root of all runs, and the folder of that.
ABOVE_A_RUN = 3

# Number of entries of a folder that are examined, so that one with millions of files costs no more than others.
MOST_ENTRIES = 1000

_MOST_BYTES = 1 << 20  # of a config.json

# Sizes in the header of a circuit, and their names in configurations.
SIZES = {"n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "d_model": "hidden_size"}


@dataclass(frozen=True)
class Identity:
    """Fingerprint, family and sizes of a run's model.

    Attributes:
        fingerprint: digest of the weights.
        family: `model_type` of the language model.
        sizes: `n_layers`, `n_heads` and `d_model`, as far as they are known.
    """

    fingerprint: str
    family: str
    sizes: Mapping[str, int]


def places(run: Path) -> list[Path]:
    """Folders that are searched, two levels deep, for a run's model; never the root of the file system."""
    above = list(islice((run.absolute() / "_").parents, ABOVE_A_RUN + 1))
    folders = [*above, Path.cwd(), cache_folder(), Path(constants.HF_HUB_CACHE)]
    return [folder for folder in dict.fromkeys(folders) if folder != folder.parent and folder.is_dir()]


def find_moved(spec: LMSpec, identity: Identity, run: Path) -> LMSpec | None:
    """The specification of a model that is gone, with the folder in which it is now; None if no place has it.

    Weights are read only of models of the same family and sizes. No code that comes with a model is run.
    """
    for folder in _models(places(run), identity.family):
        candidate = replace(spec, name=str(folder), revision=None, gguf_file=None, trust_remote_code=False)
        with suppress(OaTrainError):  # damaged, or of a family that is not supported
            if _fits(candidate, identity) and fingerprint(load_model(candidate)) == identity.fingerprint:
                return candidate
    return None


def _fits(candidate: LMSpec, identity: Identity) -> bool:
    config = load_config(candidate)
    sizes = {name: getattr(config, attribute, None) for name, attribute in SIZES.items()}
    return config.model_type == identity.family and all(sizes[name] == size for name, size in identity.sizes.items())


def _models(folders: list[Path], family: str) -> Iterator[Path]:
    """Model folders of a family in these places, each once."""
    known = set()
    for place in folders:
        for folder in _inside(place):
            if _family_of(folder / "config.json", family) and (resolved := folder.resolve()) not in known:
                known.add(resolved)
                yield folder


def _inside(place: Path) -> Iterator[Path]:
    """The folders in a place and their subfolders; in the Hub's cache, the snapshots."""
    for folder in _subfolders(place):
        yield folder
        yield from _subfolders(folder / "snapshots" if folder.name.startswith("models--") else folder)


def _subfolders(folder: Path) -> list[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in islice(entries, MOST_ENTRIES) if entry.is_dir())
    return []


def _family_of(config: Path, family: str) -> bool:
    """True if a configuration, or that of the language model in it, is of a family."""
    content: Any = None
    with suppress(OSError, ValueError, RecursionError):
        if config.is_file() and config.stat().st_size <= _MOST_BYTES:
            content = json.loads(config.read_bytes())
    parts = [content, content.get("text_config")] if isinstance(content, dict) else []
    return any(isinstance(part, dict) and part.get("model_type") == family for part in parts)
