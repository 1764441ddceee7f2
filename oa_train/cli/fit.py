"""`oa-train fit`, `validate` and `test`."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from oa_train.cli.precheck import stored_config, take_option, take_options
from oa_train.errors import CheckpointError, ConfigurationError, nearest_names
from oa_train.studies.run_folder import RunFolder

# Options of a run that its evaluation leaves out, because they only affect training.
_OF_TRAINING = ("callbacks", "logger", "enable_checkpointing")


def fit(words: Sequence[str]) -> Path | None:
    """Train, then finish the result; returns the run folder (None after `fast_dev_run`)."""
    run: RunFolder | None = _lightning("fit", words)
    return None if run is None else run.path


def validate(words: Sequence[str]) -> None:
    """Evaluate a checkpoint on the validation prompts."""
    _lightning("validate", _expand_run(words))


def test(words: Sequence[str]) -> None:
    """Evaluate a checkpoint on the test prompts."""
    _lightning("test", _expand_run(words))


def _lightning(command: str, words: Sequence[str]) -> RunFolder | None:
    from oa_train.cli.lightning_cli import OaTrainCLI

    # Files come first, so that an option overrides them wherever it is on the command line.
    configs, rest = take_options(words, "--config", "-c")
    return OaTrainCLI(command, [*(f"--config={config}" for config in configs), *rest]).run_folder


def _expand_run(words: Sequence[str]) -> list[str]:
    """Replace `--run DIR --ckpt best` with the configuration and checkpoint of that run."""
    folder, words = take_option(words, "--run")
    name, words = take_option(words, "--ckpt")
    if folder is None:
        if name is not None:
            raise ConfigurationError("--ckpt names a checkpoint of a run; name the run with --run as well.")
        return list(words)
    run = RunFolder.find(folder, whole=True)
    config = stored_config(run, words)
    name = name or "best"
    path = run.checkpoint(name) if name in ("best", "last") else Path(name)
    if name == "best" and not path.is_file() and run.checkpoint("last").is_file():
        raise CheckpointError(
            f"There is no checkpoint at {path}: the run ended before its first validation, or the file was deleted.\n"
            "Its last state can be evaluated: --ckpt last."
        )
    if path.name == name and not path.suffix and not path.exists():
        sentence = nearest_names(name, ("best", "last"))
        raise ConfigurationError(f"--ckpt is {name!r}; expected best, last or the path of a file. {sentence}")
    trainer = config.get("trainer")
    if isinstance(trainer, dict):
        config["trainer"] = {key: value for key, value in trainer.items() if key not in _OF_TRAINING}
    config = {key: value for key, value in config.items() if key not in [f"trainer.{name}" for name in _OF_TRAINING]}
    return ["--config", yaml.safe_dump(config), "--ckpt_path", str(path), *words]
