"""Turning what the option parser says into what a user can act on."""

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from oa_train.cli.classes import class_problem, own_classes
from oa_train.errors import ConfigurationError, OaTrainError, causes, nearest_names
from oa_train.models.families import WITHOUT_DEVICE_MAP

# Arguments that follow options of the whole command line.
LINKED = {"lm": "lm", "seed": "seed_everything"}

PRECISIONS = "32-true, bf16-mixed, bf16-true (with --lm.dtype bfloat16) or, on a GPU, 16-mixed"

# These set the data type of the frozen model, which has to be loaded in it.
TRUE_PRECISIONS = {"bf16-true": "bfloat16", "16-true": "float16"}

# Where what the parser would accept is not what works.
_EXPECTED = {"seed_everything": "a whole number", "trainer.precision": PRECISIONS}

# Options that were called otherwise before.
RENAMED = {
    "graph": "level",
    "penalty": "penalty_weight",
    "activation_checkpointing": "recompute",
}

# Options that the parsers do not know, because they are handled before.
_EVERYWHERE = ("quiet",)


def explain(problem: str, options: Sequence[str]) -> ConfigurationError:
    """Say what is wrong with the options or the configuration, and what would be right.

    Args:
        problem: message of the parser.
        options: all options that the command has, or all arguments of a class, without dashes.
    """
    rules: tuple[Callable[[str, Sequence[str]], str | None], ...] = (
        _missing,
        _without_value,
        _unknown_options,
        _unknown_key,
        _unknown_argument,
        _linked,
        _wrong_class,
        _wrong_group,
        _wrong_value,
        _wrong_types,
    )
    for rule in rules:
        message = rule(problem, options)
        if message:
            return ConfigurationError(message)
    return ConfigurationError(problem.strip())


def check_true_precision(option: str, precision: str, dtype: str) -> None:
    """Check that a precision that is to hold for the frozen model is the data type in which it is loaded.

    Raises:
        ConfigurationError: it is not.
    """
    wanted = TRUE_PRECISIONS.get(precision, dtype)
    if dtype != wanted:
        raise ConfigurationError(
            f"{option} is {precision}, a frozen model in {wanted}, and lm.dtype is {dtype}; give --lm.dtype {wanted}. "
            "What is trained is float32 either way."
        )


def own_error(problem: BaseException) -> OaTrainError | None:
    """The error of this package that another error was made from, if there is one.

    The parser catches what constructors raise and wraps it into messages about types.
    """
    return next((one for one in causes(problem) if isinstance(one, OaTrainError)), None)


def _missing(problem: str, options: Sequence[str]) -> str | None:
    del options
    found = re.search(r"the following arguments are required: (.*)", problem)
    if found is None:
        return None
    names = [name.strip().rpartition(".")[2] for name in found[1].split(",")]
    return f"Missing: {', '.join(f'--{name}' for name in names)}. Give them, or a --config file that holds them."


def _without_value(problem: str, options: Sequence[str]) -> str | None:
    found = re.search(r"argument (?:-\w/)?(--[\w.]+).*: expected one argument", problem)
    if found is None:
        return None
    inner = " or an argument of it" if found[1] in ("--model", "--data") and "model" in options else ""
    return f"{found[1]}{inner} needs a value."


def _unknown_options(problem: str, options: Sequence[str]) -> str | None:
    found = re.search(r"unrecognized arguments: (.*)", problem)
    if found is None:
        return None
    words = [word.split("=")[0] for word in found[1].split() if word.strip("-") and word.startswith("-")]
    if not words:
        return f"These words belong to no option: {found[1]}"
    owner = _owner(options)
    if owner is not None:
        return "\n".join(_no_argument(owner, word.lstrip("-"), options) for word in words)
    return "\n".join(_no_option(word, word.lstrip("-"), [*options, *_EVERYWHERE]) for word in words)


def _unknown_key(problem: str, options: Sequence[str]) -> str | None:
    found = re.search(r"does not accept option '(.+?)'", problem)
    return _no_option(f"{found[1]} (in the configuration)", found[1], options) if found else None


def _no_option(shown: str, name: str, options: Sequence[str]) -> str:
    if name == "lm.device_map":
        return f"There is no option {shown}. {WITHOUT_DEVICE_MAP}"
    new = RENAMED.get(name.rpartition(".")[2])
    if new is not None:
        return f"There is no option {shown}; it is called {new} now."
    sentence = nearest_names(name, options)
    if not sentence.startswith("Did you mean"):
        prefix = name.rpartition(".")[0]
        siblings = [option for option in options if prefix and option.startswith(f"{prefix}.")]
        top = sorted({option.split(".")[0] for option in options})
        sentence = nearest_names(name, siblings or top)
    return f"There is no option {shown}. {sentence}"


def _unknown_argument(problem: str, options: Sequence[str]) -> str | None:
    found = re.search(r"Option '(.+?)' is not accepted", problem)
    if found is None:
        return None
    if found[1] == "class_path":
        return "A class is given by class_path and init_args and nothing else; its arguments stand under init_args."
    owner = _owner(options)
    if owner is not None:
        return _no_argument(owner, found[1], options)
    near = nearest_names(found[1], ["class_path", "init_args", *_arguments(options)])
    return f"There is no argument {found[1]!r} here. {near}"


def _no_argument(owner: type, name: str, options: Sequence[str]) -> str:
    if RENAMED.get(name) in _parameters(owner):
        return f"{owner.__name__} has no argument {name!r}; it is called {RENAMED[name]!r} now."
    others = sorted(one.__name__ for one in own_classes() if name in _parameters(one))
    elsewhere = f" ({', '.join(others)} has one.)" if others else ""
    names = _arguments(options)
    return f"{owner.__name__} has no argument {name!r}. {nearest_names(name, names)}{elsewhere}"


def _owner(options: Sequence[str]) -> type | None:
    """The class whose arguments a parser's options are."""
    names = set(_arguments(options))
    for one in own_classes():
        parameters = _parameters(one)
        # What has no default can be given by the class that the object is made for.
        if (
            names
            and {name for name, p in parameters.items() if p.default is not p.empty} <= names <= parameters.keys()
        ):
            return one
    return None


def _parameters(one: type) -> dict[str, inspect.Parameter]:
    """Arguments of a class, those included that it hands on to its bases as keywords."""
    found: dict[str, inspect.Parameter] = {}
    for base in inspect.getmro(one):
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base).parameters
        found = {**parameters, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in found.items() if p.kind not in variadic and name not in LINKED}


def _arguments(options: Sequence[str]) -> list[str]:
    return [name for name in options if "." not in name and name not in ("help", *LINKED)]


def _linked(problem: str, options: Sequence[str]) -> str | None:
    del options
    found = re.search(r'Linked "(.+?)" must be given via "(.+?)"', problem)
    return f"{found[1]} follows --{found[2]}; give that instead." if found else None


def _wrong_class(problem: str, options: Sequence[str]) -> str | None:
    del options
    key = re.search(r'Parser key "([\w.]+)"', problem)
    value = _given(problem)
    name = value.get("class_path") if isinstance(value, dict) else value
    about_classes = re.search(
        r"given class_path|Import path|Expected a dot import path|Expected an instantiatable|path but .* invalid",
        problem,
    )
    if key is None or (about_classes is None and "Not a valid subclass" not in problem):
        return None
    if isinstance(value, dict) and not isinstance(value.get("init_args", {}), dict):
        return f"{key[1]}.init_args is {value['init_args']!r}; expected named arguments."
    if isinstance(name, str) and re.fullmatch(r"[\w.]+", name):
        return class_problem(key[1], name)
    return f"{key[1]} is {value!r}; expected the name of a class, or class_path with init_args."


def _given(problem: str) -> Any:
    patterns = (r"Given value: (.*)", r"Got value: (.*)", r"import path string: (.*)", r"given class_path '(.*?)'")
    found = next(filter(None, (re.search(pattern, problem) for pattern in patterns)), None)
    text = found[1].strip() if found else ""
    nested = re.fullmatch(r"NestedArg\(key='class_path', val=(.*)\)", text)
    text = nested[1] if nested else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _wrong_group(problem: str, options: Sequence[str]) -> str | None:
    found = re.search(r'Parser key "([\w.]+)":\s*Unable to load config \'?"?(.*?)"?\'?$', problem, re.MULTILINE)
    return group_problem(found[1], found[2], options) if found else None


def group_problem(key: str, given: object, options: Sequence[str]) -> str:
    """Say that a value stands where a group of options is expected."""
    inner = [name for name in options if name.startswith(f"{key}.")]
    return f"{key} is {given!r}; expected a group of options ({', '.join(inner[:3])}, ...) or a file that holds one."


def _wrong_value(problem: str, options: Sequence[str]) -> str | None:
    del options
    found = re.findall(r'Parser key "([\w.]+)":\s*Expected an? (.+?)\. Got value: (.*)', problem)
    if not found:
        return None
    key, expected, given = found[-1]
    owner = re.findall(r"class_path '([\w.]+)'", problem)
    of = f" of {owner[-1].rpartition('.')[2]}" if owner else ""
    return _expected(f"{LINKED.get(key, key)}{of}", given, [expected])


def _wrong_types(problem: str, options: Sequence[str]) -> str | None:
    """A value that is none of several types; nested ones have been explained before."""
    del options
    key = re.search(r'Parser key "([\w.]+)"', problem)
    reasons = re.findall(r"^\s*- (?!Expected a <class 'NoneType'>)(.+)$", problem, flags=re.MULTILINE)
    if not key or not reasons:
        return None
    types = [re.match(r"Expected an? (.+?)(?:\. Got value.*)?$", reason) for reason in reasons]
    if all(types):
        given = re.search(r"Given value: (.*)", problem)
        return _expected(key[1], given[1] if given else "wrong", [one[1] for one in types if one])
    return f"{key[1]}: " + "; ".join(reason.rstrip(":") for reason in reasons)


def _expected(key: str, given: str, types: Sequence[str]) -> str:
    given = given.strip()
    shown = given if given.startswith(("[", "{", "'")) else repr(given)
    plain = list(dict.fromkeys(_plain_type(one) for one in types))
    if "a number" in plain:
        plain = [one for one in plain if one != "a whole number"]
    choices = [name for one in plain if one.startswith("one of ") for name in one.removeprefix("one of ").split(", ")]
    sentence = nearest_names(given.strip("'"), choices) if choices else ""
    near = f" {sentence}" if sentence.startswith("Did you mean") else ""
    return f"{key} is {shown}; expected {_EXPECTED.get(key) or ' or '.join(plain)}.{near}"


def _plain_type(expected: str) -> str:
    literal = re.fullmatch(r"typing\.Literal\[(.+)\]", expected)
    if literal:
        return "one of " + literal[1].replace("'", "")
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list"}
    plain = re.fullmatch(r"<class '(\w+)'>", expected)
    return names.get(plain[1], plain[1]) if plain else expected
