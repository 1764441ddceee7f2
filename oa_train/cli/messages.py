"""Messages that replace those of the option parser: which option is wrong, and what was expected."""

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from oa_train.cli.faults import place_outside, reasons
from oa_train.cli.precheck import LINKED
from oa_train.errors import ConfigurationError, nearest_names, suggestion
from oa_train.masks.base import MaskDistribution
from oa_train.models.parts import WITHOUT_DEVICE_MAP
from oa_train.tasks.task import Task
from oa_train.training.module import FrozenModelModule
from oa_train.training.trainer_options import PRECISIONS

# Bases of the classes that a configuration can name.
BASES = (FrozenModelModule, Task, MaskDistribution)

# Values that work, for options of which the parser would accept more.
_EXPECTED = {"seed_everything": "an integer", "trainer.precision": PRECISIONS}

_PLAIN_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list"}

# New names of renamed options.
RENAMED = {
    "graph": "level",
    "seed": "seed_everything",
    "penalty": "penalty_weight",
    "activation_checkpointing": "recompute",
}

# Places where a message of the parser quotes a value.
_VALUE = re.compile(r"(?:Given value: |Got value: |Unable to load config |path string: )(.*)")


def explained(problem: str, parser: ArgumentParser) -> ConfigurationError:
    """The error for a message of a parser: that of a command, or of the arguments of a class, its `owner`."""
    text = problem.strip()
    if match := re.search(r"the following arguments are required: (.*)", problem):
        names = [f"--{name.strip().rpartition('.')[2]}" for name in match[1].split(",")]
        text = f"Missing: {', '.join(names)}. Give them, or a --config file that holds them."
    elif match := re.search(r"argument (?:-\w/)?(--[\w.]+).*: expected one argument", problem):
        text = f"{match[1]}{' or an argument of it' if match[1] in ('--model', '--data') else ''} needs a value."
    elif match := re.search(r"unrecognized arguments: (.*)", problem):
        options = [word.split("=")[0] for word in match[1].split() if word.strip("-") and word.startswith("-")]
        lines = [_unknown(option.lstrip("-"), option, parser) for option in options]
        text = "\n".join(lines) or f"These words belong to no option: {match[1]}"
    elif match := re.search(r"ption '(.+?)'", problem):
        text = _unknown(match[1], f"{match[1]} (in the configuration)", parser)
    elif keys := re.findall(r'Parser key "([\w.]+)"', problem):
        text = _wrong_value(keys[-1], problem, parser)
    return ConfigurationError(text)


def option_names(parser: ArgumentParser) -> list[str]:
    """Every option of a parser and of its subcommands, without dashes."""
    options = [option for action in _actions(parser) for option in action.option_strings if len(option) > 2]
    # A misspelt name is never meant as one that appends to a list, or as a class's help page.
    names = [name for name in (option.removeprefix("--") for option in options) if re.fullmatch(r"[\w.]+", name)]
    return [name for name in dict.fromkeys(names) if not name.endswith((".help", "print_shtab"))]


def _actions(parser: ArgumentParser) -> Iterator[Any]:
    for action in parser._actions:
        yield action
        for subparser in action.choices.values() if isinstance(action.choices, dict) else ():
            yield from _actions(subparser)


def group_problem(key: str, value: object, parser: ArgumentParser) -> str:
    """Message for a single value in place of a group of options."""
    inner = [name for name in option_names(parser) if name.startswith(f"{key}.")]
    value = _parsed(value) if isinstance(value, str) else value  # on a command line a number is text
    return f"{key} is {value!r}; expected a group of options ({', '.join(inner[:3])}, ...) or a file that holds one."


def null_problems(parser: ArgumentParser, options: Any) -> Iterator[str]:
    """Messages for class arguments that are null although their types exclude it, which the parser does not check."""
    for action in parser._actions:
        value = options.get(action.dest) if hasattr(action, "_typehint") else None
        for chosen in value if isinstance(value, list) else [value]:
            if chosen is not None and hasattr(chosen, "class_path") and hasattr(chosen, "init_args"):
                yield from _null_arguments(pkgutil.resolve_name(chosen.class_path), chosen.init_args)


def _null_arguments(kind: type, arguments: Any) -> Iterator[str]:
    for base in (base for base in kind.__mro__ if "__init__" in vars(base)):
        try:
            hints = get_type_hints(vars(base)["__init__"])
        except Exception:  # noqa: BLE001, S112 (names that a library imports for its type checker only)
            continue
        for name in [name for name in hints if name in arguments and arguments[name] is None]:
            if not {type(None), Any, object} & {*_leaves(hints[name])}:
                yield f"{kind.__name__}.{name} is null; expected a value, or leave it out."


def _known_classes(base: type[Any]) -> dict[str, type[Any]]:
    """Imported subclasses that can be instantiated, by the bare names under which the parser knows them."""
    return {kind.__name__: kind for kind in _below(base) if not _is_abstract(kind) and kind.__name__[0] != "_"}


def _is_abstract(kind: type) -> bool:
    """True if a class has abstract methods, whether or not it derives from `abc.ABC`."""
    return any(getattr(inspect.getattr_static(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))


def _below(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _below(kind)


def _unknown(name: str, shown: str, parser: ArgumentParser) -> str:
    """Message for an option, or an argument of a class, that does not exist."""
    if name == "lm.device_map":
        return f"There is no option {shown}. {WITHOUT_DEVICE_MAP}"
    if name == "class_path":
        return "A class is given by class_path and init_args and nothing else; its arguments belong under init_args."
    names, owner = option_names(parser), getattr(parser, "owner", None)
    prefix, _, last = name.rpartition(".")
    new = RENAMED.get(last)
    if owner is None:
        start = f"There is no option {shown}"
        if new is not None:
            return f"{start}; it is called {new} now."
        siblings = [option for option in names if prefix and option.startswith(f"{prefix}.")]
        top = sorted({option.split(".")[0] for option in [*names, "quiet"]})
        return f"{start}. {suggestion(name, [*names, 'quiet']) or nearest_names(name, siblings or top)}"
    arguments = [argument for argument in names if "." not in argument and argument not in ("help", *LINKED)]
    if owner in BASES:
        near = nearest_names(name, ["class_path", "init_args", *arguments])
        return f"There is no argument {name!r} here. {near}"
    start = f"{owner.__name__} has no argument {name!r}"
    if new in arguments:
        return f"{start}; it is called {new!r} now."
    others = sorted(other for base in BASES for other, kind in _known_classes(base).items() if _takes(kind, name))
    elsewhere = f" ({', '.join(others)} has one.)" if others else ""
    return f"{start}. {nearest_names(name, arguments)}{elsewhere}"


def _takes(kind: type, argument: str) -> bool:
    return any(argument in inspect.signature(base).parameters for base in kind.__mro__ if "__init__" in vars(base))


def _wrong_value(key: str, problem: str, parser: ArgumentParser) -> str:
    quoted = _VALUE.findall(problem)  # the outermost comes last
    if not quoted:
        return f"{key} or an argument of it: {reasons(problem)}"
    value = _parsed(quoted[-1])
    hint = next((getattr(action, "_typehint", None) for action in _actions(parser) if action.dest == key), None)
    if hint is None:
        return group_problem(key, value, parser)
    leaves = list(_leaves(hint))
    classes = tuple(leaf for leaf in leaves if inspect.isclass(leaf) and leaf not in (*_PLAIN_TYPES, type(None)))
    name = value.get("class_path") if isinstance(value, dict) else value
    if classes and isinstance(value, dict) and not isinstance(value.get("init_args", {}), dict):
        return f"{key}.init_args is {value['init_args']!r}; expected named arguments."
    if classes and isinstance(name, str) and re.fullmatch(r"[\w.]+", name):
        return _class_problem(key, name, classes)
    owner = getattr(parser, "owner", None)
    shown_key = LINKED.get(key, key if owner is None else f"{owner.__name__}.{key}")
    expected = "the name of a class, or class_path with init_args." if classes else _expected(key, value, leaves)
    return f"{shown_key} is {value!r}; expected {expected}"


def _expected(key: str, value: object, leaves: Sequence[Any]) -> str:
    choices = [leaf for leaf in leaves if isinstance(leaf, str)]
    plain = [_PLAIN_TYPES[leaf] for leaf in dict.fromkeys(leaves) if leaf in _PLAIN_TYPES]
    if "a number" in plain and "an integer" in plain:
        plain.remove("an integer")
    if choices:
        plain.append(f"one of {', '.join(choices)}")
    near = suggestion(str(value), choices) if key not in _EXPECTED else ""
    return f"{_EXPECTED.get(key, ' or '.join(plain))}. {near}".rstrip()


def _leaves(hint: Any) -> Iterator[Any]:
    """Types and literal values in a type annotation."""
    origin = get_origin(hint)
    if origin is Literal:
        yield from get_args(hint)
    elif origin is None:
        if not isinstance(hint, list):  # the arguments of a callable
            yield hint
    elif origin is not type:
        if origin is list:
            yield list
        for part in get_args(hint):
            yield from _leaves(part)


def _parsed(text: str) -> Any:
    """The value that the parser quotes as `text`."""
    nested = re.fullmatch(r"NestedArg\(key='class_path', val=(.*)\)", text.strip())
    text = nested[1] if nested else text.strip()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _class_problem(key: str, name: str, bases: tuple[type, ...]) -> str:
    """Message for a name that is not a usable class: its module, name or base class is wrong."""
    start = f"{key} is {name!r}, which"
    known = {short: kind for base in bases for short, kind in _known_classes(base).items()}
    classes = (kind for base in (*bases, *BASES) for kind in (base, *_below(base)))
    try:
        kind = pkgutil.resolve_name(name) if "." in name else next(kind for kind in classes if kind.__name__ == name)
    except StopIteration:
        return f"{start} is not a known class. {nearest_names(name, known)}"
    except Exception as problem:  # noqa: BLE001 (importing runs whatever the module holds)
        place = place_outside(problem)
        near = suggestion(name, [f"{kind.__module__}.{kind.__name__}" for kind in known.values()])
        hint = near or "Modules are found in the folders that PYTHONPATH names."
        raised = "" if place is None else f" (raised {place})"
        return f"{start} cannot be imported: {type(problem).__name__}: {problem}{raised}.\n{hint}"
    expected = f"expected a kind of {bases[0].__name__}: {', '.join(list(known)[:10])}"
    if not inspect.isclass(kind):
        return f"{start} is a {type(kind).__name__}, not a class."
    if not issubclass(kind, bases):
        return f"{start} is not a {bases[0].__name__}; {expected}."
    fault = "is abstract" if kind in bases or _is_abstract(kind) else "cannot be used here"
    return f"{start} {fault}; {expected}."
