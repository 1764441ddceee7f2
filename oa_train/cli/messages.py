"""Turning what the option parser says into what a user can act on."""

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence

from oa_train.errors import ConfigurationError, OaTrainError, nearest_names
from oa_train.masks.base import MaskDistribution
from oa_train.tasks.base import Task
from oa_train.training.base import FrozenModelModule

CONFIGURABLE_CLASSES: tuple[type, ...] = (FrozenModelModule, Task, MaskDistribution)


def explain(problem: str, options: Sequence[str]) -> ConfigurationError:
    """Say what is wrong with the options or the configuration, and what would be right.

    Args:
        problem: message of the parser.
        options: all options that the command has, without dashes.
    """
    for rule in (_missing, _unknown_options, _unknown_key, _unknown_argument, _unknown_class, _wrong_value):
        message = rule(problem, options)
        if message:
            return ConfigurationError(message)
    return ConfigurationError(_without_boilerplate(problem))


def own_error(problem: BaseException) -> OaTrainError | None:
    """The error of this package that another error was made from, if there is one.

    The parser catches what constructors raise and wraps it into messages about types.
    """
    seen: BaseException | None = problem
    while seen is not None:
        if isinstance(seen, OaTrainError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _missing(problem: str, options: Sequence[str]) -> str | None:
    del options
    found = re.search(r"the following arguments are required: (.*)", problem)
    if found is None:
        return None
    names = [name.strip().rpartition(".")[2] for name in found[1].split(",")]
    return f"Missing: {', '.join(f'--{name}' for name in names)}. Give them, or a --config file that holds them."


def _unknown_options(problem: str, options: Sequence[str]) -> str | None:
    found = re.search(r"unrecognized arguments: (.*)", problem)
    if found is None:
        return None
    names = [word.lstrip("-").split("=")[0] for word in found[1].split() if word.startswith("-")]
    if not names:
        return f"These words belong to no option: {found[1]}"
    return "\n".join(_no_option(f"--{name}", name, options) for name in names)


def _unknown_key(problem: str, options: Sequence[str]) -> str | None:
    found = re.search(r"does not accept option '(.+?)'", problem)
    return _no_option(f"{found[1]} (in the configuration)", found[1], options) if found else None


def _no_option(shown: str, name: str, options: Sequence[str]) -> str:
    sentence = nearest_names(name, options)
    if not sentence.startswith("Did you mean"):
        prefix = name.rpartition(".")[0]
        siblings = [option for option in options if prefix and option.startswith(f"{prefix}.")]
        top = sorted({option.split(".")[0] for option in options})
        sentence = nearest_names(name, siblings or top)
    return f"There is no option {shown}. {sentence}"


def _unknown_argument(problem: str, options: Sequence[str]) -> str | None:
    del options
    found = re.search(r"Option '(.+?)' is not accepted", problem)
    if found is None:
        return None
    # The parser does not say whose argument it is, so each name is followed by the classes that have it.
    owners: dict[str, list[str]] = {}
    for one in _configurable():
        for name in inspect.signature(one).parameters:
            owners.setdefault(name, []).append(one.__name__)
    near = difflib.get_close_matches(found[1], owners, n=3)
    sentence = f"Did you mean {', '.join(f'{name} (of {_listed(owners[name])})' for name in near)}?" if near else ""
    return f"No class in this configuration has an argument {found[1]!r}. {sentence}".rstrip()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names))


def _unknown_class(problem: str, options: Sequence[str]) -> str | None:
    del options
    found = re.search(r"Expected a dot import path string: (\S+)", problem)
    key = re.search(r'Parser key "([\w.]+)"', problem)
    if found is None or key is None:
        return None
    names = [one.__name__ for one in _configurable() if _belongs(one, key[1])]
    return f"{key[1]} is {found[1]!r}, which is no class known here. {nearest_names(found[1], names)}"


def _wrong_value(problem: str, options: Sequence[str]) -> str | None:
    del options
    found = re.findall(r'Parser key "([\w.]+)":\s*Expected an? (.+?)\. Got value: (.*)', problem)
    if not found:
        return None
    key, expected, given = found[-1]
    owner = re.findall(r"class_path '([\w.]+)'", problem)
    of = f" of {owner[-1].rpartition('.')[2]}" if owner else ""
    return f"{key}{of} is {given.strip()!r}; expected {_plain_type(expected)}."


def _plain_type(expected: str) -> str:
    literal = re.fullmatch(r"typing\.Literal\[(.+)\]", expected)
    if literal:
        return "one of " + literal[1].replace("'", "")
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    plain = re.fullmatch(r"<class '(\w+)'>", expected)
    return names.get(plain[1], plain[1]) if plain else expected


def _without_boilerplate(problem: str) -> str:
    key = re.search(r'Parser key "([\w.]+)"', problem)
    reasons = re.findall(r"^\s*- (?!Expected a <class 'NoneType'>)(.+)$", problem, flags=re.MULTILINE)
    if key and reasons:
        types = [re.fullmatch(r"Expected an? (.+)", reason) for reason in reasons]
        if all(types):
            given = re.search(r"Given value: (.*)", problem)
            expected = " or ".join(_plain_type(one[1]) for one in types if one)
            return f"{key[1]} is {given[1].strip() if given else 'wrong'}; expected {expected}."
        return f"{key[1]}: " + "; ".join(reason.rstrip(":") for reason in reasons)
    return problem.strip()


def _belongs(one: type, key: str) -> bool:
    base = {"model": FrozenModelModule, "data": Task, "masks": MaskDistribution}.get(key.rpartition(".")[2])
    return base is None or issubclass(one, base)


def _configurable() -> Iterable[type]:
    pending = list(CONFIGURABLE_CLASSES)
    while pending:
        one = pending.pop()
        pending += one.__subclasses__()
        if not inspect.isabstract(one):
            yield one
