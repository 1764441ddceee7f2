"""Checks of a command line that need neither torch nor a model: files and their contents."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oa_train.errors import ConfigurationError, nearest_names
from oa_train.studies.run_folder import RunFolder, is_gone, read_config

# Arguments of a module or task that follow an option at the top.
LINKED = {"lm": "lm", "seed": "seed_everything"}

_GROUPS = ("lm", "data", "model", "trainer", "finish")


def check_files(words: Sequence[str]) -> None:
    """Check every `--config` and `--run` of a command line, and that nothing linked is given to a class."""
    for name in (word.partition("=")[0] for word in words):
        parts = name.removeprefix("--").replace(".init_args.", ".").split(".")
        if name.startswith("--") and parts[0] in ("model", "data") and parts[1:2] and parts[1] in LINKED:
            raise _only_at_the_top(name, parts[1])
    for path in map(Path, take_options(words, "--config", "-c")[0]):
        if not path.is_file():
            state = "is a folder" if path.is_dir() else "does not exist"
            raise ConfigurationError(f"The configuration file {str(path)!r} {state}.{_configs_near(path)}")
        _check_content(path)
    for folder in take_options(words, "--run")[0]:
        _check_content(RunFolder.find(folder).config_path)


def _check_content(path: Path) -> None:
    """Check the values of a configuration file that the parser would accept unchecked."""
    content = read_config(path)
    name = content.get("experiment", "")
    if not isinstance(name, str | list | dict):
        raise ConfigurationError(
            f"{path}: experiment is {name}, which YAML reads as a {type(name).__name__}; expected a string. "
            f'Quote it: experiment: "{name}".'
        )
    for group in _GROUPS:
        if group in content and content[group] is None:
            raise ConfigurationError(f"{path}: {group} is empty; expected a group of options, or leave it out.")
    for group in ("data", "model"):
        chosen = content.get(group)
        arguments = chosen.get("init_args") if isinstance(chosen, dict) else None
        if isinstance(arguments, dict) and (linked := next((name for name in LINKED if name in arguments), None)):
            raise _only_at_the_top(f"{path}: {group}.init_args.{linked}", linked)


def take_options(words: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """Values of every occurrence of an option, and the other words of a command line, in their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*names, action="append", default=[], dest="values")
    try:
        chosen, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as problem:
        raise ConfigurationError(f"{names[0]} needs a value.") from problem
    return chosen.values, rest


def take_option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Value of an option that may be given once, and the other words."""
    values, rest = take_options(words, name)
    if len(values) > 1:
        raise ConfigurationError(f"{name} is given {len(values)} times: {', '.join(values)}; expected one.")
    return (values[0] if values else None), rest


def stored_config(run: RunFolder, words: Sequence[str]) -> dict[str, Any]:
    """Configuration of a run, unless it asks to run a model's own code: folders are passed on, trust is not.

    A model that the command line does not name, and that is not where it was, is looked for (see `RunFolder.lm`).
    """
    config = run.config()
    if _trusts(config) and not any(word.startswith("--lm.trust_remote_code") for word in words):
        raise ConfigurationError(
            f"{run.config_path} asks to run code that comes with the model. If you trust it, say so on the command "
            "line: --lm.trust_remote_code true."
        )
    lm = config.get("lm")
    if isinstance(lm, dict) and is_gone(str(lm.get("name", ""))) and not _names_model(words):
        lm["name"] = run.lm().name
    return config


def _names_model(words: Sequence[str]) -> bool:
    """True if a command line, or a configuration file that it names, says which model is used."""
    files = [read_config(Path(path)).get("lm") for path in take_options(words, "--config", "-c")[0]]
    return any(word.partition("=")[0] == "--lm.name" for word in words) or any(
        isinstance(lm, dict) and "name" in lm for lm in files
    )


def _trusts(content: object) -> bool:
    """True if a configuration trusts remote code anywhere, in nested or dotted keys."""
    if isinstance(content, Mapping):
        return any(
            (str(key).rpartition(".")[2] == "trust_remote_code" and bool(value)) or _trusts(value)
            for key, value in content.items()
        )
    return isinstance(content, list) and any(map(_trusts, content))


def _only_at_the_top(option: str, name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{option} cannot be given to a class: {LINKED[name]} is given once, at the top, and handed on."
    )


def _configs_near(path: Path) -> str:
    parent = path if path.is_dir() else path.parent
    names = sorted(other.name for other in parent.glob("*.y*ml") if other.is_file()) if parent.is_dir() else []
    return f" {nearest_names(path.name, names, f'In {parent}')}" if names else ""
