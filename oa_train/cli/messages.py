"""Messages for users instead of the option parser's: which option is wrong, and what was expected."""

import ast
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from oa_train.cli.precheck import LINKED
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.masks.base import MaskDistribution
from oa_train.models.families import WITHOUT_DEVICE_MAP
from oa_train.tasks.task import Task
from oa_train.training.module import FrozenModelModule

# Bases of the classes that a configuration can name.
BASES = (FrozenModelModule, Task, MaskDistribution)

PRECISIONS = "32-true, bf16-mixed, bf16-true (with --lm.dtype bfloat16) or, on a GPU, 16-mixed"

# Values that work, where the parser would accept more.
_EXPECTED = {"seed_everything": "an integer", "trainer.precision": PRECISIONS}

_PLAIN_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list"}

# New names of renamed options.
RENAMED = {
    "graph": "level",
    "seed": "seed_everything",
    "penalty": "penalty_weight",
    "activation_checkpointing": "recompute",
}

# Longer values are cut in messages.
_MOST_SHOWN = 80


def explained(problem: str, parser: ArgumentParser) -> ConfigurationError:
    """The error for a message of the parser.

    Args:
        problem: the message.
        parser: the parser of a command, or of the arguments of a class, which is its `owner`.
    """
    for pattern, message in (
        (r"the following arguments are required: (.*)", _missing),
        (r"argument (?:-\w/)?(--[\w.]+).*: expected one argument", _without_value),
        (r"unrecognized arguments: (.*)", _unknown_words),
        (r"ption '(.+?)'", _unknown_key),
        (r'Linked "(.+?)" must be given via', _linked),
        (r'Parser key "([\w.]+)"', _wrong_value),
    ):
        match = re.search(pattern, problem)
        text = message(match[1], problem, parser) if match else None
        if text:
            return ConfigurationError(text)
    return ConfigurationError(problem.strip())


def option_names(parser: ArgumentParser) -> list[str]:
    """Every option of a parser and of its subcommands, without dashes."""
    names: dict[str, None] = {}
    for action in parser._actions:
        names |= dict.fromkeys(option.removeprefix("--") for option in action.option_strings if len(option) > 2)
        for subparser in _choices(action).values():
            names |= dict.fromkeys(option_names(subparser))
    # A misspelt name is never meant to append to a list, or to be a class's help page.
    return [name for name in names if re.fullmatch(r"[\w.]+", name) and not name.endswith((".help", "print_shtab"))]


def group_problem(key: str, value: object, parser: ArgumentParser) -> str:
    """Message for a single value in the place of a group of options."""
    inner = [name for name in option_names(parser) if name.startswith(f"{key}.")]
    return f"{key} is {value!r}; expected a group of options ({', '.join(inner[:3])}, ...) or a file that holds one."


def reasons(problem: str) -> str:
    """The reasons in a message of the parser, without those that only name a type."""
    lines = [line.strip(" -") for line in problem.splitlines()]
    skipped = ("Parser key", "Does not validate", "Subtypes", "Errors", "Problem with", "Expected a ", "Given value")
    return "; ".join(line for line in lines if line and not line.startswith(skipped)) or problem.strip()


def null_problems(parser: ArgumentParser, options: Any) -> Iterator[str]:
    """Messages for arguments of classes that are null against their types; the parser takes null for any."""
    for action in parser._actions:
        value = options.get(action.dest) if hasattr(action, "_typehint") else None
        for chosen in value if isinstance(value, list) else [value]:
            if chosen is not None and hasattr(chosen, "class_path") and hasattr(chosen, "init_args"):
                yield from _null_arguments(chosen.class_path, chosen.init_args)


def _null_arguments(path: str, arguments: Any) -> Iterator[str]:
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name)
    for base in (base for base in kind.__mro__ if "__init__" in vars(base)):
        try:
            hints = get_type_hints(base.__init__)
        except Exception:  # noqa: BLE001, S112 (names that a library imports for its type checker only)
            continue
        for argument, hint in hints.items():
            if (
                argument in arguments
                and arguments[argument] is None
                and not {type(None), Any, object} & {*_leaves(hint)}
            ):
                yield f"{kind.__name__}.{argument} is null; expected a value, or leave it out."


def known_classes(base: type[Any]) -> dict[str, type[Any]]:
    """Imported subclasses that can be instantiated, by the bare names under which the parser knows them."""
    return {kind.__name__: kind for kind in _below(base) if not inspect.isabstract(kind) and kind.__name__[0] != "_"}


def _below(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _below(kind)


def _missing(names: str, problem: str, parser: ArgumentParser) -> str:
    del problem, parser
    options = ", ".join(f"--{name.strip().rpartition('.')[2]}" for name in names.split(","))
    return f"Missing: {options}. Give them, or a --config file that holds them."


def _without_value(option: str, problem: str, parser: ArgumentParser) -> str:
    del problem
    has_arguments = option in ("--model", "--data") and "model" in option_names(parser)
    return f"{option}{' or an argument of it' if has_arguments else ''} needs a value."


def _unknown_words(words: str, problem: str, parser: ArgumentParser) -> str:
    del problem
    options = [word.split("=")[0] for word in words.split() if word.strip("-") and word.startswith("-")]
    if not options:
        return f"These words belong to no option: {words}"
    return "\n".join(_unknown(option.lstrip("-"), option, parser) for option in options)


def _unknown_key(name: str, problem: str, parser: ArgumentParser) -> str:
    is_file = "does not accept" in problem
    return _unknown(name, f"{name} (in the configuration)" if is_file else name, parser)


def _linked(name: str, problem: str, parser: ArgumentParser) -> str:
    del parser
    source = problem.partition('given via "')[2].partition('"')[0]
    return f"{name} follows --{source}; give that instead."


def _unknown(name: str, shown: str, parser: ArgumentParser) -> str:
    """Message for an option, or an argument of a class, that does not exist."""
    if name == "lm.device_map":
        return f"There is no option {shown}. {WITHOUT_DEVICE_MAP}"
    if name == "class_path":
        return "A class is given by class_path and init_args and nothing else; its arguments stand under init_args."
    names, owner = option_names(parser), getattr(parser, "owner", None)
    prefix, _, last = name.rpartition(".")
    new = RENAMED.get(last)
    if owner is None:
        start = f"There is no option {shown}"
        if new is not None:
            return f"{start}; it is called {new} now."
        siblings = [option for option in names if prefix and option.startswith(f"{prefix}.")]
        top = sorted({option.split(".")[0] for option in [*names, "quiet"]})
        near = nearest_names(name, [*names, "quiet"])
        return f"{start}. {near if near.startswith('Did you mean') else nearest_names(name, siblings or top)}"
    arguments = [argument for argument in names if "." not in argument and argument not in ("help", *LINKED)]
    if owner in BASES:
        near = nearest_names(name, ["class_path", "init_args", *arguments])
        return f"There is no argument {name!r} here. {near}"
    start = f"{owner.__name__} has no argument {name!r}"
    if new in arguments:
        return f"{start}; it is called {new!r} now."
    others = sorted(other for base in BASES for other, kind in known_classes(base).items() if _takes(kind, name))
    elsewhere = f" ({', '.join(others)} has one.)" if others else ""
    return f"{start}. {nearest_names(name, arguments)}{elsewhere}"


def _takes(kind: type, argument: str) -> bool:
    return any(argument in inspect.signature(base).parameters for base in kind.__mro__ if "__init__" in vars(base))


def _wrong_value(key: str, problem: str, parser: ArgumentParser) -> str | None:
    keys = re.findall(r'Parser key "([\w.]+)"', problem)
    key, value = keys[-1], _value(problem)
    if value is Ellipsis:
        return f"{key} or an argument of it: {reasons(problem)}"
    actions = (action for action in (*parser._actions, *_subparser(parser)._actions) if action.dest == key)
    action = next(actions, None)
    hint = getattr(action, "_typehint", None)
    if hint is None:
        return group_problem(key, value, parser)
    leaves = list(_leaves(hint))
    classes = tuple(leaf for leaf in leaves if inspect.isclass(leaf) and leaf not in (*_PLAIN_TYPES, type(None)))
    name = value.get("class_path") if isinstance(value, dict) else value
    if classes:
        if isinstance(value, dict) and not isinstance(value.get("init_args", {}), dict):
            return f"{key}.init_args is {value['init_args']!r}; expected named arguments."
        if isinstance(name, str) and re.fullmatch(r"[\w.]+", name):
            return _class_problem(key, name, classes)
        return f"{key} is {_shown(value)}; expected the name of a class, or class_path with init_args."
    owner = getattr(parser, "owner", None)
    shown_key = key if owner is None else f"{owner.__name__}.{key}"
    return f"{LINKED.get(key, shown_key)} is {_shown(value)}; expected {_expected(key, value, leaves)}"


def _subparser(parser: ArgumentParser) -> ArgumentParser:
    """The parser of the only subcommand; the parser itself if there is none."""
    parsers = [choice for action in parser._actions for choice in _choices(action).values()]
    return parsers[0] if parsers else parser


def _choices(action: Any) -> dict[str, ArgumentParser]:
    return action.choices if isinstance(action.choices, dict) else {}


def _expected(key: str, value: object, leaves: Sequence[Any]) -> str:
    if key in _EXPECTED:
        return f"{_EXPECTED[key]}."
    choices = [leaf for leaf in leaves if isinstance(leaf, str)]
    plain = [_PLAIN_TYPES[leaf] for leaf in dict.fromkeys(leaves) if leaf in _PLAIN_TYPES]
    if "a number" in plain and "an integer" in plain:
        plain.remove("an integer")
    if choices:
        plain.append(f"one of {', '.join(choices)}")
    near = nearest_names(str(value), choices) if choices else ""
    return f"{' or '.join(plain)}.{f' {near}' if near.startswith('Did you mean') else ''}"


def _leaves(hint: Any) -> Iterator[Any]:
    """Types and literal values of which a type annotation consists."""
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


def _value(problem: str) -> Any:
    """The value that a message of the parser quotes; `...` if it quotes none."""
    patterns = (
        r"Given value: (.*)",
        r"Got value: (.*)",
        r"Unable to load config ['\"](.*)['\"]",
        r"path string: (.*)",
    )
    match = next(filter(None, (re.search(pattern, problem) for pattern in patterns)), None)
    if match is None:
        return Ellipsis
    text = match[1].strip()
    nested = re.fullmatch(r"NestedArg\(key='class_path', val=(.*)\)", text)
    text = nested[1] if nested else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _class_problem(key: str, name: str, bases: tuple[type, ...]) -> str:
    """Message for a name that is no usable class: its module, its name or its base class is wrong."""
    module, _, short = name.rpartition(".")
    known = {other: kind for base in bases for other, kind in known_classes(base).items()}
    start = f"{key} is {name!r}, "
    if module:
        try:
            kind = getattr(import_module(module), short)
        except ModuleNotFoundError as problem:
            missing = problem.name or module
            if module == missing or module.startswith(f"{missing}."):
                return f"{start}but there is no module {missing!r}.{_near_modules(missing)}"
            return f"{start}but the module {module} cannot be imported: it needs {missing!r}, which is not installed."
        except AttributeError:
            members = inspect.getmembers(import_module(module), inspect.isclass)
            names = [other for other, kind in members if issubclass(kind, bases) and kind not in bases]
            near = f" {nearest_names(short, names)}" if names else ""
            return f"{start}but the module {module} has no class {short!r}.{near}"
        except Exception as problem:  # noqa: BLE001 (importing runs whatever the module holds)
            return f"{start}but the module {module} cannot be imported: {type(problem).__name__}: {problem}"
    else:
        kinds = {kind.__name__: kind for base in (*BASES, *bases) for kind in (base, *_below(base))}
        if name not in kinds:
            return f"{start}which is no class known here. {nearest_names(name, known)}"
        kind = kinds[name]
    expected = f"expected a kind of {bases[0].__name__}: {', '.join(list(known)[:10])}"
    if not inspect.isclass(kind):
        return f"{start}which is a {type(kind).__name__} and no class."
    if not issubclass(kind, bases):
        return f"{start}which is no {bases[0].__name__}; {expected}."
    if kind in bases or inspect.isabstract(kind):
        return f"{start}which is abstract; {expected}."
    return f"{start}which cannot be used here; {expected}."


def _near_modules(missing: str) -> str:
    parent, _, name = missing.rpartition(".")
    if not parent:
        return " It must be installed, or lie in a folder that PYTHONPATH names."
    package: types.ModuleType = import_module(parent)
    siblings = [module.name for module in pkgutil.iter_modules(getattr(package, "__path__", []))]
    return f" {nearest_names(name, siblings)}" if siblings else f" {parent} has no modules inside."
