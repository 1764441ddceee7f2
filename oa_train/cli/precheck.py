"""Checks of a command line that need neither torch nor a model: files, and what stands in them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oa_train.errors import ConfigurationError, nearest_names
from oa_train.studies.run_folder import RunFolder, read_config

# Arguments of a module or task that follow an option at the top.
LINKED = {"lm": "lm", "seed": "seed_everything"}

# Options that are strings, which YAML may parse as another type, and groups of options.
_TEXTS = ("experiment",)
_GROUPS = ("lm", "data", "model", "trainer", "finish")
_CLASSES = ("data", "model")


def check_files(command: str, words: Sequence[str]) -> None:
    """Check every `--config` and `--run` of a command line.

    Raises:
        ConfigurationError: a file is missing, is no YAML mapping, or holds a value that no command takes.
        ArtefactError: a folder is no run.
    """
    if command in ("demo", "convert"):
        return
    for word in words:
        linked = re.match(r"--(?:model|data)\.(?:init_args\.)?(lm|seed)(\.\w+)?(?==|$)", word)
        if linked:
            raise ConfigurationError(_only_at_the_top(word.split("=")[0], linked[1]))
    for name, value in option_values(words, ("--config", "-c", "--run")):
        if value is None or value.startswith("--"):
            kind = "" if name == "--run" else ": a configuration file"
            raise ConfigurationError(f"{name} needs a value{kind}.")
        if name == "--run":
            check_content(RunFolder.find(value).config_path)
        elif not Path(value).is_file():
            state = "is a folder" if Path(value).is_dir() else "does not exist"
            raise ConfigurationError(f"The configuration file {value!r} {state}.{_configs_near(Path(value))}")
        else:
            check_content(Path(value))


def check_content(path: Path) -> None:
    """Check the values of a configuration file that the parser would accept unchecked.

    Raises:
        ConfigurationError: the file cannot be read, or a value cannot be right.
    """
    content = read_config(path)
    for name in _TEXTS:
        if name in content and not isinstance(content[name], str | list | dict):
            raise ConfigurationError(
                f"{path}: {name} is {content[name]}, which YAML reads as a {type(content[name]).__name__}; "
                f'expected a string. Quote it: {name}: "{content[name]}".'
            )
    for name in _GROUPS:
        if name in content and content[name] is None:
            raise ConfigurationError(f"{path}: {name} is empty; expected a group of options, or leave it out.")
    for name in _CLASSES:
        chosen = content.get(name)
        arguments = chosen.get("init_args") if isinstance(chosen, dict) else None
        for linked in LINKED:
            if isinstance(arguments, dict) and linked in arguments:
                raise ConfigurationError(f"{path}: {_only_at_the_top(f'{name}.init_args.{linked}', linked)}")


def option_values(words: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Occurrences of options with the values that follow them."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            yield name, value if equals else (words[index + 1] if index + 1 < len(words) else None)


def take_options(words: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Remove every occurrence of an option with its value from a command line.

    Returns:
        The values in their order, and the other words.

    Raises:
        ConfigurationError: a value is missing.
    """
    rest: list[str] = []
    values: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word != name and not word.startswith(f"{name}="):
            rest.append(word)
            continue
        value = word.partition("=")[2] if "=" in word else next(remaining, "--")
        if value.startswith("--"):
            raise ConfigurationError(f"{name} needs a value.")
        values.append(value)
    return values, rest


def take_option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Remove an option that may be given once from a command line.

    Raises:
        ConfigurationError: its value is missing, or it is given several times.
    """
    values, rest = take_options(words, name)
    if len(values) > 1:
        raise ConfigurationError(f"{name} is given {len(values)} times: {', '.join(values)}; expected one.")
    return (values[0] if values else None), rest


def configs_first(words: Sequence[str]) -> list[str]:
    """Move every `--config` to the front, so that an option overrides it wherever it stands."""
    configs: list[str] = []
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word in ("--config", "-c"):
            configs += [word, next(remaining, "")]
        else:
            (configs if word.startswith(("--config=", "-c=")) else rest).append(word)
    return [*configs, *rest]


def refuse_stored_trust(config: Mapping[str, Any], path: Path, words: Sequence[str]) -> None:
    """Refuse to run a model's own code because a run folder says so: folders are passed on, trust is not.

    Raises:
        ConfigurationError: the folder's configuration trusts remote code and the command line does not repeat it.
    """
    if _trusts(config) and not any(word.startswith("--lm.trust_remote_code") for word in words):
        raise ConfigurationError(
            f"{path} asks to run code that comes with the model. If you trust it, say so on the command line: "
            "--lm.trust_remote_code true."
        )


def _trusts(content: object) -> bool:
    """True if a configuration trusts remote code anywhere, in nested or dotted keys."""
    if isinstance(content, Mapping):
        return any(
            (str(key).rpartition(".")[2] == "trust_remote_code" and bool(value)) or _trusts(value)
            for key, value in content.items()
        )
    return isinstance(content, list) and any(map(_trusts, content))


def _only_at_the_top(option: str, name: str) -> str:
    return f"{option} cannot be given to a class: {LINKED[name]} is given once, at the top, and handed on."


def _configs_near(path: Path) -> str:
    parent = path if path.is_dir() else path.parent
    names = sorted(other.name for other in parent.glob("*.y*ml") if other.is_file()) if parent.is_dir() else []
    return f" {nearest_names(path.name, names).replace('Valid names', f'In {parent}')}" if names else ""
