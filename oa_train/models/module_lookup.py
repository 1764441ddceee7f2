"""Cached lookup of a model's modules, valid until one of them is swapped."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from oa_train.errors import ModelError


class Lookup:
    """Looks up modules of a model by path, and remembers where they were, so that a later swap is noticed."""

    def __init__(self) -> None:
        # Parents are weak references: one of them is the model, which a cache must not keep alive.
        self._children: list[tuple[weakref.ref[nn.Module], str, nn.Module, type[nn.Module]]] = []

    def get(self, module: nn.Module, path: str) -> nn.Module:
        """The module that a path leads to; raises AttributeError if it leads nowhere."""
        for name in path.split("."):
            child = module.get_submodule(name)
            self._children.append((weakref.ref(module), name, child, type(child)))
            module = child
        return module

    def find(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """The module itself, looked up by its path in a model."""
        return self.get(model, next(path for path, part in model.named_modules() if part is module))

    def holds(self) -> bool:
        """True if no module has been swapped or has changed its class."""
        return all(
            getattr(parent(), "_modules", {}).get(name) is child and type(child) is kind
            for parent, name, child, kind in self._children
        )


_T = TypeVar("_T")

_lookups: "weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, Lookup]]]" = weakref.WeakKeyDictionary()


def looked_up(model: Any, find: Callable[[Any, Lookup], _T]) -> _T:
    """The result of a function of a model, cached until a module that it looked up is swapped.

    Args:
        model: a `PreTrainedModel`.
        find: gets every module from the lookup that it is passed, and keeps no other state of the model.

    Raises:
        ModelError: the model is not built as its entry in the family table says.
    """
    known = _lookups.setdefault(model, {})
    if find not in known or not known[find][1].holds():
        lookup = Lookup()
        try:
            known[find] = find(model, lookup), lookup
        except (AttributeError, TypeError) as problem:
            raise ModelError(
                f"This {model.config.model_type} model is not built as its entry in the family table says: {problem}. "
                "The table follows transformers 5; is the model's code older, newer, or its own?"
            ) from problem
    result: _T = known[find][0]
    return result
