"""The checker of annotations under pytest: beartype that takes an int for a float, as mypy and PEP 484 do.

Importing this makes `jaxtyping`'s import hook a good deal faster. By itself it checks every call twice over, with all
dimensions, of functions too that take no tensor; and it compiles its checks anew for each function inside of another.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from types import CodeType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

# A function inside of another is made anew at every call, and compiling its checks takes longer than running it.
MOST_CLOSURES = 5

_with_dimensions = jaxtyping.jaxtyped
_closures: Counter[CodeType] = Counter()


def _names_a_tensor(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return True  # not evaluated: it may
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    parts = annotation if isinstance(annotation, list | tuple) else get_args(annotation)
    return any(map(_names_a_tensor, parts))


def _checked(function: Callable[..., Any], typechecker: Callable[..., Any]) -> Callable[..., Any]:
    if "<locals>" in function.__qualname__:
        _closures[function.__code__] += 1
        if _closures[function.__code__] > MOST_CLOSURES:
            return function
    if any(map(_names_a_tensor, function.__annotations__.values())):
        return _with_dimensions(function, typechecker=typechecker)
    checked = check(function)

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

    # Of no file: messages name the deepest line in a user's files, which this would seem to be.
    called.__code__ = called.__code__.replace(co_filename="<type checker>")

    return called


def _jaxtyped(decorated: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """`jaxtyping.jaxtyped`, with dimensions only where an annotation names a tensor."""
    if decorated is None:
        return partial(_jaxtyped, typechecker=typechecker)
    if inspect.isfunction(decorated):
        return _checked(decorated, typechecker)
    if inspect.isclass(decorated) and is_dataclass(decorated) and "__init__" in vars(decorated):
        decorated.__init__ = _checked(decorated.__init__, typechecker)
    return decorated


jaxtyping.jaxtyped = _jaxtyped
