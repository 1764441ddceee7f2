"""Parsers that the commands share: the model is named once, errors name the nearest options."""

import os
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

import oa_train.masks.hard_concrete
import oa_train.masks.uniform
import oa_train.tasks
import oa_train.training.circuit_module
import oa_train.training.constants_module
import oa_train.zoo.known  # noqa: F401 (imported so that classes are known by their bare names)
from oa_train.cli.messages import LINKED, explain, group_problem, own_error
from oa_train.errors import ArtefactError, ConfigurationError, OaTrainError, nearest_names
from oa_train.models.loading import LMSpec
from oa_train.tasks.task import Task

CONFIG_FILE = "config.yaml"


class ExplainingParser(ArgumentParser):
    """A parser that raises our own error, with the nearest valid names, instead of printing its usage."""

    def error(self, message: str, ex: BaseException | None = None) -> NoReturn:
        """Raise `ConfigurationError`."""
        raise _explained(self, message, ex) from ex


class ExplainingLightningParser(LightningArgumentParser):
    """Lightning's parser with the same errors."""

    def error(self, message: str, ex: BaseException | None = None) -> NoReturn:
        """Raise `ConfigurationError`."""
        raise _explained(self, message, ex) from ex


def _explained(parser: ArgumentParser, message: str, cause: BaseException | None) -> OaTrainError:
    # A nested parser, of a class's arguments, has explained what it knows best already.
    return (own_error(cause) if cause is not None else None) or explain(message, option_names(parser))


def option_names(parser: ArgumentParser) -> list[str]:
    """Every option of a parser and of its subcommands, without dashes."""
    names: dict[str, None] = {}
    for action in parser._actions:
        names |= dict.fromkeys(option.removeprefix("--") for option in action.option_strings if len(option) > 2)
        choices = action.choices if isinstance(action.choices, dict) else {}
        for subparser in choices.values():
            names |= dict.fromkeys(option_names(subparser))
    # Neither appending to a list nor a class's help page is what a misspelt name was meant to be.
    return [name for name in names if re.fullmatch(r"[\w.]+", name) and not name.endswith((".help", "print_shtab"))]


def add_model_and_task(parser: ArgumentParser, targets: Iterable[str]) -> None:
    """Add the groups `lm` and `data`, and hand the model's name to all that load it.

    Args:
        parser: gets the options.
        targets: class arguments with `lm` and `seed` of their own; they follow the top-level ones.
    """
    parser.add_class_arguments(LMSpec, "lm")
    parser.add_subclass_arguments(Task, "data", required=True)
    for target in targets:
        for field in fields(LMSpec):
            parser.link_arguments(f"lm.{field.name}", f"{target}.init_args.lm.{field.name}")
        parser.link_arguments("seed_everything", f"{target}.init_args.seed")


def check_groups(parser: ArgumentParser, options: Namespace) -> None:
    """Check that groups of options hold options; the parser takes `trainer: 5` from a file as it stands.

    Raises:
        ConfigurationError: a single value stands for a group.
    """
    names = option_names(parser)
    for group in dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name):
        value = options.get(group)
        if value is not None and not isinstance(value, Namespace):
            raise ConfigurationError(group_problem(group, value, names))


def check_output(option: str, given: str) -> None:
    """Check that a folder can be made, and files in it.

    Raises:
        ConfigurationError: a file is in the way, or the folder above must not be written to.
    """
    folder = Path(given).expanduser().absolute()
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not above.is_dir():
        raise ConfigurationError(f"{option} is {given!r}, but {above} is a file and no folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{option} is {given!r}, but the folder {above} must not be written to.")


def run_folder(given: str) -> Path:
    """Check that a folder is a run.

    Raises:
        ArtefactError: it does not exist or has no configuration; runs nearby are listed.
    """
    folder = Path(given).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return folder
    state = f"has no {CONFIG_FILE}" if folder.is_dir() else "does not exist"
    if folder.is_file():
        raise ArtefactError(
            f"--run is {given!r}, which is a file. Give the folder of the run, {str(folder.parent)!r}?"
        )
    above = [one.parent for one in (folder, folder.parent) if one.name == "front"]
    if folder.is_dir() and any((run / CONFIG_FILE).is_file() for run in above):
        raise ArtefactError(
            f"--run is {given!r}, of a run that has trained several circuits side by side. `test` and `validate` take "
            f"the run itself and report all of them; `compare` and `minimal` take one of them, <run>/front/<N>."
        )
    near = sorted({*folder.glob(f"*/{CONFIG_FILE}"), *folder.parent.glob(f"*/{CONFIG_FILE}")})[:5]
    hint = f" Runs nearby: {', '.join(str(path.parent) for path in near)}." if near else ""
    raise ArtefactError(
        f"--run is {given!r}, a folder that {state}.\nExpected the run folder that `oa-train fit` made, "
        f"runs/<experiment>/version_<N>.{hint}"
    )


def refuse_stored_trust(folder: Path, words: Sequence[str]) -> None:
    """Refuse to run a model's own code because a run folder says so; folders are passed on, trust is not.

    Raises:
        ConfigurationError: the folder's configuration trusts remote code and the command line does not repeat it.
    """
    stored = read_config(folder / CONFIG_FILE)
    if "config" in stored:
        raise ConfigurationError(
            f"{folder / CONFIG_FILE} names another configuration file, as no run folder of `oa-train fit` does."
        )
    if _trusts(stored) and not any(word.startswith("--lm.trust_remote_code") for word in words):
        raise ConfigurationError(
            f"{folder / CONFIG_FILE} asks to run code that comes with the model. If you trust it, say so on the "
            "command line: --lm.trust_remote_code true."
        )


def _trusts(content: object) -> bool:
    """Whether a configuration trusts remote code anywhere, in nested or in dotted keys."""
    if isinstance(content, dict):
        return any(
            (str(key).rpartition(".")[2] == "trust_remote_code" and bool(value)) or _trusts(value)
            for key, value in content.items()
        )
    return isinstance(content, list) and any(map(_trusts, content))


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML configuration.

    Raises:
        ConfigurationError: the file is missing, or no YAML mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeys)  # noqa: S506 (it makes nothing but plain values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        how = "cannot be read" if isinstance(problem, OSError) else "cannot be read as YAML"
        first = " ".join(str(problem).split())
        raise ConfigurationError(f"The configuration {path} {how}: {first}") from problem
    if content is None:
        raise ConfigurationError(f"The configuration {path} is empty; expected named options.")
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"The configuration {path} holds a {type(content).__name__}; expected named options (experiment: name)."
        )
    return content


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a name that stands twice in one mapping; YAML itself would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1 and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands here twice", key.start_mark)
        return super().construct_mapping(node, deep)


def check_configs(argv: Sequence[str]) -> None:
    """Check every `--config` of a command line, and what is given once for all, before the parser sees it.

    Raises:
        ConfigurationError: a file is missing, or no YAML mapping; the model or the seed is given to a class.
    """
    words = list(argv)
    for word in words:
        found = re.match(r"--(?:model|data)\.(?:init_args\.)?(lm|seed)(\.\w+)?(?==|$)", word)
        if found:
            raise ConfigurationError(_given_at_the_top(word.split("=")[0], found[1]))
    for index, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--config", "-c"):
            given = value or (words[index + 1] if index + 1 < len(words) else "")
            if not given or given.startswith("--"):
                raise ConfigurationError(f"{name} needs a value: a configuration file.")
            if not Path(given).is_file():
                state = "is a folder" if Path(given).is_dir() else "does not exist"
                raise ConfigurationError(f"The configuration file {given!r} {state}.{_configs_near(given)}")
            _check_config(Path(given))


def _check_config(path: Path) -> None:
    content = read_config(path)
    for group in ("model", "data"):
        chosen = content.get(group)
        arguments = chosen.get("init_args") if isinstance(chosen, dict) else None
        for name in LINKED:
            if isinstance(arguments, dict) and name in arguments:
                raise ConfigurationError(f"{path}: {_given_at_the_top(f'{group}.init_args.{name}', name)}")


def _given_at_the_top(shown: str, name: str) -> str:
    return f"{shown} cannot be given to a class: {LINKED[name]} is given once, at the top, and handed on."


def configs_first(argv: Sequence[str]) -> list[str]:
    """Move every `--config` to the front, so that an option overrides it wherever it stands."""
    configs: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--config", "-c"):
            configs += [word, next(words, "")]
        else:
            (configs if word.startswith(("--config=", "-c=")) else rest).append(word)
    return [*configs, *rest]


def take_options(argv: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Take every occurrence of an option with its value out of a command line.

    Returns:
        The values in their order, and the other words.

    Raises:
        ConfigurationError: a value is missing.
    """
    rest: list[str] = []
    values: list[str] = []
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ConfigurationError(f"{name} needs a value.")
            values.append(value)
        elif word.startswith(f"{name}="):
            values.append(word.removeprefix(f"{name}="))
        else:
            rest.append(word)
    return values, rest


def take_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take an option that may be given once out of a command line.

    Raises:
        ConfigurationError: its value is missing, or it is given several times.
    """
    values, rest = take_options(argv, name)
    if len(values) > 1:
        raise ConfigurationError(f"{name} is given {len(values)} times: {', '.join(values)}; expected one.")
    return (values[0] if values else None), rest


def _configs_near(given: str) -> str:
    parent = Path(given) if Path(given).is_dir() else Path(given).parent
    names = sorted(path.name for path in parent.glob("*.y*ml") if path.is_file()) if parent.is_dir() else []
    sentence = nearest_names(Path(given).name, names) if names else ""
    return f" {sentence.replace('Valid names', f'In {parent}')}" if names else ""
