"""Finished runs, as the commands that ask questions of them are given them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from oa_train.ablations.context import check_belongs
from oa_train.cli.arguments import (
    CONFIG_FILE,
    ExplainingParser,
    add_model_and_task,
    check_groups,
    read_config,
    refuse_stored_trust,
    run_folder,
)
from oa_train.cli.interruption import resume_command
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.models.loading import CausalLM, load_model
from oa_train.studies.runs import TrainedCircuit

# What of a run's configuration says which model and which prompts.
SHARED_KEYS = ("seed_everything", "lm", "data")

# Of a run that trained several circuits side by side, the folder that holds them.
FRONT = "front"


def finished_parser(command: str, description: str, run: str) -> ExplainingParser:
    """A parser with the options that all commands on finished runs have.

    Args:
        command: its name.
        description: what it does.
        run: help of the option `--run`.
    """
    parser = ExplainingParser(prog=f"oa-train {command}", description=description, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="configuration file; may be given several times")
    parser.add_argument("--run", type=str, required=True, help=run)
    parser.add_argument("--device", type=str, default="auto", help="where the model runs: auto, cpu, cuda, cuda:1")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of all draws")
    add_model_and_task(parser, ("data",))
    return parser


def finished_folder(given: str) -> Path:
    """Check that a folder holds a run, or one of several circuits that a run has trained.

    Raises:
        ArtefactError: it does not.
    """
    folder = Path(given).expanduser()
    if folder.is_dir() and (_configured(folder) / CONFIG_FILE).is_file():
        return folder
    return run_folder(given)


def _configured(folder: Path) -> Path:
    """Folder of the configuration: RUN of RUN/front/N, else the folder itself."""
    is_one_of_several = folder.parent.name == FRONT and not (folder / CONFIG_FILE).exists()
    return folder.parent.parent if is_one_of_several else folder


def chosen_options(parser: ExplainingParser, folder: Path, words: Sequence[str]) -> Any:
    """The objects that a command line asks for; model, task and seed are the run's unless it says otherwise.

    Args:
        parser: of the command.
        folder: from `finished_folder`.
        words: the command line without `--run`.
    """
    run = _configured(folder)
    refuse_stored_trust(run, words)
    config = {key: value for key, value in read_config(run / CONFIG_FILE).items() if key in SHARED_KEYS}
    options = parser.parse_args(["--config", yaml.safe_dump(config), "--run", str(folder), *words])
    check_groups(parser, options)
    return parser.instantiate_classes(options)


def load_run(folder: Path) -> TrainedCircuit:
    """Read the circuit of a run.

    Raises:
        ArtefactError: there is none; the message says why.
    """
    try:
        return TrainedCircuit.load(folder)
    except ArtefactError as problem:
        raise ArtefactError(_why_there_is_none(folder, problem)) from problem


def _why_there_is_none(folder: Path, problem: ArtefactError) -> str:
    if not (folder / "circuit").exists() and (folder / "constants").is_dir():
        return (
            f"{folder} holds constants of components that were ablated alone, and no circuit.\nGive runs that "
            "trained a circuit, or constants for one (`circuit` or `keep` of ConstantsModule)."
        )
    if not (folder / "circuit").exists() and (folder / FRONT).is_dir():
        numbers = sorted((path.name for path in (folder / FRONT).iterdir()), key=lambda name: (len(name), name))
        return f"{folder} holds several circuits. Give one of them: {folder / FRONT}/N, N being {', '.join(numbers)}."
    return (
        f"{problem}\nThe run was not finished, or was damaged since. This finishes it, in a new version:\n"
        f"  {resume_command(_configured(folder))}"
    )


def loaded_model(chosen: Any, runs: Sequence[TrainedCircuit]) -> CausalLM:
    """Load the model, on its device, and check that the circuits are of it.

    Args:
        chosen: from `chosen_options`.
        runs: circuits, with their constants.
    """
    device = _device(chosen.device)
    model = load_model(chosen.lm)
    torch.nn.Module.to(model, device)
    for run in runs:
        check_belongs(model, run.circuit, run.constants)
    return model


def _device(given: str) -> str:
    if given == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=given).cpu()
    except (RuntimeError, AssertionError) as problem:
        first = str(problem).split("\n")[0]
        raise ConfigurationError(f"--device {given!r} cannot be used: {first}") from problem
    return given
