"""Parsers that the commands share: the model is named once, errors name the nearest options."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

import oa_train.masks.hard_concrete
import oa_train.masks.uniform
import oa_train.tasks
import oa_train.training.circuits  # noqa: F401 (imported so that classes are known by their bare names)
from oa_train.cli.messages import explain, own_error
from oa_train.errors import ArtefactError, ConfigurationError, OaTrainError
from oa_train.models.loading import LMSpec
from oa_train.tasks.base import Task

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
    return [name for name in names if not name.endswith("+")]


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


def run_folder(given: str) -> Path:
    """Check that a folder is a run.

    Raises:
        ArtefactError: it does not exist or has no configuration; runs nearby are listed.
    """
    folder = Path(given).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return folder
    state = f"has no {CONFIG_FILE}" if folder.is_dir() else "does not exist"
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
    stored = read_config(folder / CONFIG_FILE).get("lm") or {}
    if stored.get("trust_remote_code") and not any(word.startswith("--lm.trust_remote_code") for word in words):
        raise ConfigurationError(
            f"{folder / CONFIG_FILE} asks to run code that comes with the model {stored.get('name')!r}. If you "
            "trust it, say so on the command line: --lm.trust_remote_code true."
        )


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML configuration.

    Raises:
        ConfigurationError: the file is missing, or no YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        first = " ".join(str(problem).split())
        raise ConfigurationError(f"The configuration {path} cannot be read as YAML: {first}") from problem
    if not isinstance(content, dict):
        raise ConfigurationError(f"The configuration {path} holds {type(content).__name__}; expected named options.")
    return content


def check_configs(argv: Sequence[str]) -> None:
    """Check every `--config` of a command line before the parser sees it.

    Raises:
        ConfigurationError: a file is missing, or no YAML mapping.
    """
    words = list(argv)
    for index, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--config", "-c"):
            given = value or (words[index + 1] if index + 1 < len(words) else "")
            if not Path(given).is_file():
                raise ConfigurationError(f"There is no configuration file {given!r} (--config).{_configs_near(given)}")
            read_config(Path(given))


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


def take_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take an option with its value out of a command line.

    Raises:
        ConfigurationError: its value is missing.
    """
    rest: list[str] = []
    value = None
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ConfigurationError(f"{name} needs a value.")
        elif word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
        else:
            rest.append(word)
    return value, rest


def _configs_near(given: str) -> str:
    parent = Path(given).parent
    names = sorted(path.name for path in parent.glob("*.y*ml")) if parent.is_dir() else []
    return f" In {parent}: {', '.join(names[:10])}." if names else ""
