"""Arguments of a module: how they are stored in a checkpoint and restored from it."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any, TypeVar

from oa_train.errors import CheckpointError, ConfigurationError, nearest_names
from oa_train.masks.base import MaskDistribution
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.spec import LMSpec

Built = TypeVar("Built")


def as_list(patterns: str | list[str]) -> list[str]:
    """Patterns as a list, even if there is only one."""
    return [patterns] if isinstance(patterns, str) else patterns


def as_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as plain values; functions, such as those that make optimisers, are left out."""
    plain = {name: value for name, value in arguments.items() if not callable(value)}
    settings: dict[str, Any] = json.loads(json.dumps(plain, default=_plain))
    return settings


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.item() if hasattr(value, "item") else str(value)


def rebuilt(module: type[Built], record: Mapping[str, Any], changes: Mapping[str, Any]) -> Built:
    """The module of a class that wrote a checkpoint, untrained.

    The record has its identity and settings; the changes replace arguments. Trust in a model's own code is never taken
    from the file.

    Raises:
        CheckpointError: the checkpoint is of another class, or its settings are not arguments of this class.
        ConfigurationError: a change is not an argument of the class, or cannot work.
    """
    names = inspect.signature(module).parameters
    for name in changes:
        if name not in names:
            raise ConfigurationError(f"{module.__name__} has no argument {name!r}. {nearest_names(name, names)}")
    identity, settings = record["identity"], record["settings"]
    written_by = identity.get("module")
    if written_by != module.__name__:
        raise CheckpointError(f"The checkpoint is of the module {written_by}; expected one of {module.__name__}.")
    arguments = {name: value for name, value in settings.items() if name in names} | dict(changes)
    try:
        if "lm" not in changes:
            arguments["lm"] = LMSpec(**settings["lm"] | {"trust_remote_code": False})
        if settings.get("dictionaries") and "dictionaries" not in changes:
            arguments["dictionaries"] = [DictionarySpec(**spec) for spec in settings["dictionaries"]]
        if "masks" in names and "masks" not in changes:
            arguments["masks"] = _distribution(**identity["masks"])
        return module(**arguments)
    except (TypeError, KeyError, AttributeError) as problem:
        raise CheckpointError(
            f"The settings in the checkpoint, and what was given in their place, build no {module.__name__}: {problem}"
        ) from problem


def _distribution(**described: Any) -> Callable[[int], MaskDistribution]:
    """The mask distribution that a description names; only classes that have been imported are known."""
    name = described.pop("class")
    known, remaining = dict[str, type[MaskDistribution]](), [MaskDistribution]
    while remaining:
        subclasses = remaining.pop().__subclasses__()
        known |= {kind.__name__: kind for kind in subclasses}
        remaining += subclasses
    if name not in known:
        raise CheckpointError(
            f"The checkpoint has masks of the class {name!r}. {nearest_names(name, known)} Import the module that "
            "defines the class, or give `masks`."
        )
    return partial(known[name], **described)
