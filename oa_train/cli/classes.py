"""What is wrong with the name of a class, part by part: its module, its name, its kind."""

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from oa_train.errors import nearest_names
from oa_train.masks.base import MaskDistribution
from oa_train.tasks.task import Task
from oa_train.training.module import FrozenModelModule

# The last part of an option's name, and what its class must be.
BASES: dict[str, type] = {
    "model": FrozenModelModule,
    "data": Task,
    "masks": MaskDistribution,
    "logger": Logger,
    "callbacks": Callback,
}


def own_classes() -> list[type]:
    """Classes of this package that a configuration can name."""
    return [one for base in (FrozenModelModule, Task, MaskDistribution) for one in known_classes(base)]


def known_classes(base: type) -> list[type]:
    """Subclasses of a class that have been imported and can be made, and so go by their bare names."""
    return [one for one in _below(base) if not inspect.isabstract(one) and not one.__name__.startswith("_")]


def class_problem(key: str, given: str) -> str | None:
    """Say why a name does not lead to a class that can be used.

    Args:
        key: the option that names the class ("data", "trainer.logger").
        given: the name, bare or with its module.

    Returns:
        A message, or None when nothing is wrong with the name.
    """
    base = BASES.get(key.rpartition(".")[2].rstrip("+"))
    if "." not in given:
        return _bare_name_problem(key, given, base)
    module, _, name = given.rpartition(".")
    problem = _module_problem(module)
    if problem is not None:
        return f"{key} is {given!r}, but {problem}"
    found = getattr(import_module(module), name, None)
    if found is None:
        return f"{key} is {given!r}, but the module {module} has no class {name!r}.{_near_in(module, name, base)}"
    return _kind_problem(key, given, found, base)


def _bare_name_problem(key: str, given: str, base: type | None) -> str | None:
    if base is None:
        return f"{key} is {given!r}, which is no class known here. Give its module as well: package.module.{given}."
    names = [one.__name__ for one in known_classes(base)]
    if given in names:
        return None
    for one in (*BASES.values(), *own_classes()):
        if one.__name__ == given:
            return _kind_problem(key, given, one, base)
    return f"{key} is {given!r}, which is no class known here. {nearest_names(given, names)}"


def _kind_problem(key: str, given: str, found: Any, base: type | None) -> str | None:
    if not inspect.isclass(found):
        return f"{key} is {given!r}, which is a {type(found).__name__} and no class."
    if base is None:
        return None
    expected = f"expected a kind of {base.__name__}: {', '.join(one.__name__ for one in known_classes(base)[:10])}"
    if not issubclass(found, base):
        return f"{key} is {given!r}, which is no {base.__name__}; {expected}."
    if found is base or inspect.isabstract(found):
        return f"{key} is {given!r}, which is abstract; {expected}."
    return None


def _module_problem(module: str) -> str | None:
    try:
        import_module(module)
    except ModuleNotFoundError as problem:
        missing = problem.name or module
        if missing == module or module.startswith(f"{missing}."):
            return f"there is no module {missing!r}.{_near_modules(missing)}"
        return f"the module {module} cannot be imported: it needs {missing!r}, which is not installed."
    except Exception as problem:  # noqa: BLE001 (importing runs whatever the module holds)
        return f"the module {module} cannot be imported: {type(problem).__name__}: {problem}"
    return None


def _near_modules(missing: str) -> str:
    parent, _, name = missing.rpartition(".")
    if not parent:
        return " It must be installed, or lie in a folder that PYTHONPATH names."
    inside = getattr(import_module(parent), "__path__", None)
    siblings = [found.name for found in pkgutil.iter_modules(inside)] if inside is not None else []
    return f" {nearest_names(name, siblings)}" if siblings else f" {parent} has no modules inside."


def _near_in(module: str, name: str, base: type | None) -> str:
    members = inspect.getmembers(import_module(module), inspect.isclass)
    names = [found for found, one in members if base is None or (issubclass(one, base) and one is not base)]
    return f" {nearest_names(name, names)}" if names else ""


def _below(base: type[Any]) -> Iterator[type[Any]]:
    for one in base.__subclasses__():
        yield one
        yield from _below(one)
