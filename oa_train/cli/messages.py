"""Turning what the option parser says into what a user can act on."""

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
    for rule in (_unknown_options, _unknown_key, _unknown_argument, _unknown_class, _wrong_value):
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
    argument = re.search(r"Option '(.+?)' is not accepted", problem)
    owners = re.findall(r"class_path[=\s]'([\w.]+)'", problem[: argument.start()] if argument else "")
    after = re.search(r"is not accepted\. Got value: Namespace\(class_path='([\w.]+)'", problem)
    if argument is None or not (owners or after):
        return None
    owner = (after[1] if after else owners[-1]).rpartition(".")[2]
    classes = {one.__name__: one for one in _configurable()}
    valid = [name for name in inspect.signature(classes[owner]).parameters if name != "n_entries"]
    return f"{owner} has no argument {argument[1]!r}. {nearest_names(argument[1], valid)}"


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
