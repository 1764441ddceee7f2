"""Parsers of the commands: the model is given once, and errors name the nearest options."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

import oa_train.masks.hard_concrete
import oa_train.masks.uniform
import oa_train.tasks
import oa_train.training.circuit_module
import oa_train.training.constants_module
import oa_train.training.lens_module
import oa_train.training.tracing_module
import oa_train.zoo.known  # noqa: F401 (imported so that classes are known by their bare names)
from oa_train.cli.faults import own_error
from oa_train.cli.messages import explained, group_problem, null_problems, option_names
from oa_train.errors import ConfigurationError
from oa_train.models.spec import LMSpec
from oa_train.tasks.task import Task


class ExplainingParser(ArgumentParser):
    """Raises this package's errors instead of printing its usage; knows the class whose arguments it parses."""

    owner: type | None = None

    def __init__(self, *args: Any, allow_abbrev: bool = False, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **options)

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, *args: Any, **options: Any) -> Any:
        """Add the arguments of a class."""
        if nested_key is None:
            self.owner = theclass
        return super().add_class_arguments(theclass, nested_key, *args, **options)

    def error(self, message: str, ex: BaseException | None = None) -> NoReturn:
        """Raise the error of this package that a nested parser or constructor raised, else one with `message`."""
        raise own_error(ex) or explained(message, self) from ex


class ExplainingLightningParser(ExplainingParser, LightningArgumentParser):
    """Parser of Lightning's commands."""


def add_config(parser: ArgumentParser) -> None:
    """Add the option `--config`."""
    parser.add_argument("-c", "--config", action="config", help="configuration file; may be given several times")


def add_model_and_task(parser: ArgumentParser) -> None:
    """Add the groups `lm` and `data`; see `link_model`."""
    parser.add_class_arguments(LMSpec, "lm")
    parser.add_subclass_arguments(Task, "data", required=True)


def link_model(parser: ArgumentParser, targets: Iterable[str] = ("data",)) -> None:
    """Link `lm` and `seed` of the targets to the top-level options."""
    for target in targets:
        for field in fields(LMSpec):
            parser.link_arguments(f"lm.{field.name}", f"{target}.init_args.lm.{field.name}")
        parser.link_arguments("seed_everything", f"{target}.init_args.seed")


def check_values(parser: ArgumentParser, options: Namespace) -> None:
    """Refuse values that the parser accepts unchecked: `trainer: 5` in a file, and null instead of any value."""
    for group in dict.fromkeys(name.rpartition(".")[0] for name in option_names(parser) if "." in name):
        value = options.get(group)
        if value is not None and not isinstance(value, Namespace):
            raise ConfigurationError(group_problem(group, value, parser))
    if problems := list(null_problems(parser, options)):
        raise ConfigurationError("\n".join(problems))


def make_paths_absolute(options: Namespace) -> None:
    """Make the paths of the model, its adapter and the prompts absolute, so that a run works from anywhere."""
    spec = LMSpec(**vars(options.lm))
    for name in ("name", "gguf_file", "adapter"):
        options.lm[name] = getattr(spec, name)
    arguments = options.data.get("init_args") or Namespace()
    if isinstance(arguments.get("path"), str):
        path = Path(arguments["path"]).expanduser()
        arguments["path"] = str(path.absolute()) if path.exists() else arguments["path"]
