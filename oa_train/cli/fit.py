"""`oa-train fit`, `validate` and `test`."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from oa_train.cli.lightning_cli import OaTrainCLI
from oa_train.cli.precheck import configs_first, refuse_stored_trust, take_option
from oa_train.cli.quiet import silence_libraries
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.studies.run_folder import RunFolder
from oa_train.training.module import FrozenModelModule

# Options of a training that an evaluation of its run leaves out: they matter while training only.
_OF_TRAINING = ("callbacks", "logger", "enable_checkpointing")


def fit(words: Sequence[str]) -> Path | None:
    """Train, then finish; returns the run folder (None after `fast_dev_run`)."""
    cli = _run_lightning("fit", words)
    return cli.run_folder.path if cli.run_folder is not None else None


def validate(words: Sequence[str]) -> None:
    """Evaluate a checkpoint on the validation prompts."""
    _run_lightning("validate", _expand_run(words))


def test(words: Sequence[str]) -> None:
    """Evaluate a checkpoint on the test prompts."""
    _run_lightning("test", _expand_run(words))


def _run_lightning(command: str, words: Sequence[str]) -> OaTrainCLI:
    silence_libraries()
    return OaTrainCLI(
        command,
        model_class=FrozenModelModule,
        subclass_mode_model=True,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"allow_abbrev": False, "prog": "oa-train"},
        trainer_defaults={"max_epochs": 20, "log_every_n_steps": 10, "num_sanity_val_steps": 0},
        args=[command, *configs_first(words)],
    )


def _expand_run(words: Sequence[str]) -> list[str]:
    """Replace `--run DIR --ckpt best` by the configuration and checkpoint of that run."""
    folder, words = take_option(words, "--run")
    name, words = take_option(words, "--ckpt")
    if folder is None:
        if name is not None:
            raise ConfigurationError("--ckpt names a checkpoint of a run; name the run with --run as well.")
        return list(words)
    run = RunFolder.find(folder, whole=True)
    config = run.config()
    refuse_stored_trust(config, run.config_path, words)
    if not any(word.split("=")[0] == "--lm.name" for word in words):
        run.check_model(str((config.get("lm") or {}).get("name", "")))
    name = name or "best"
    is_name = name in ("best", "last")
    if not is_name and not Path(name).suffix and not Path(name).exists():
        sentence = nearest_names(name, ("best", "last"))
        raise ConfigurationError(f"--ckpt is {name!r}; expected best, last or the path of a file. {sentence}")
    path = run.checkpoint(name) if is_name else Path(name)
    trainer = config.get("trainer")
    if isinstance(trainer, dict):
        config["trainer"] = {key: value for key, value in trainer.items() if key not in _OF_TRAINING}
    config = {key: value for key, value in config.items() if key not in [f"trainer.{name}" for name in _OF_TRAINING]}
    return ["--config", yaml.safe_dump(config), "--ckpt_path", str(path), *words]
