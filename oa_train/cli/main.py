"""Entry point of `oa-train`: which command, and what its errors become.

Torch and Lightning are imported by the commands that need them, so that help is quick.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from oa_train import __version__
from oa_train.errors import ConfigurationError, OaTrainError, nearest_names

Command = Callable[[list[str]], object]

# Name, module, function, and what the overview says.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("oa_train.cli.demo", "demo", "the whole way on the built-in model, in about two minutes"),
    "fit": ("oa_train.cli.fitting", "fit", "train masks and constants; --ckpt_path resumes"),
    "validate": ("oa_train.cli.fitting", "validate", "evaluate a run on its validation prompts"),
    "test": ("oa_train.cli.fitting", "test", "evaluate a run on held-out prompts"),
    "compare": ("oa_train.cli.comparing", "compare_command", "learned ablation against mean and zero ablation"),
}

TERMINATED, INTERRUPTED, FAULT, MISTAKE = 143, 130, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status of the process.

    Args:
        argv: command line without the program's name; that of the process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _overview()
        if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
            raise ConfigurationError(f"There is no option {words[0]}; the command comes first. See oa-train --help.")
        chosen = parser.parse_args(words[:1])
        module, function, _ = COMMANDS[chosen.command]
        command: Command = getattr(import_module(module), function)
        command(words[1:])
    except SystemExit as stop:  # --help, --version and --print_config end this way
        return _interrupted(stop) or (stop.code if isinstance(stop.code, int) else FAULT)
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception as problem:  # noqa: BLE001 (the one place where errors become messages)
        return _report(problem)
    return 0


def _interrupted(stop: SystemExit) -> int | None:
    """Status of a run that Lightning has ended gracefully because of Ctrl-C or SIGTERM."""
    if type(stop).__name__ == "SIGTERMException":
        _say("ended by SIGTERM; resume with --ckpt_path and checkpoints/last.ckpt of the run")
        return TERMINATED
    if isinstance(stop.__context__, KeyboardInterrupt):
        _say("interrupted; resume with --ckpt_path and checkpoints/last.ckpt of the run")
        return INTERRUPTED
    return None


def _overview() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="oa-train",
        description="Learned ablations and sparse circuit masks for Hugging Face transformers.",
        epilog="`oa-train COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"oa-train {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (_, _, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


class _Parser(argparse.ArgumentParser):
    """Names the nearest commands when one is misspelt."""

    def error(self, message: str) -> NoReturn:
        given = message.partition("invalid choice: '")[2].partition("'")[0]
        if given:
            raise ConfigurationError(f"There is no command {given!r}. {nearest_names(given, COMMANDS)}")
        raise ConfigurationError(f"{message}\nCommands: {', '.join(COMMANDS)}.")


def _report(problem: Exception) -> int:
    if isinstance(problem, OaTrainError):
        _say(str(problem))
        return problem.exit_status
    from oa_train.cli.messages import own_error

    own = own_error(problem)
    if own is not None:
        return _report(own)
    if _is_misconfiguration(problem):
        _say(str(problem))
        return MISTAKE
    _say(f"{type(problem).__name__}: {problem}")
    if os.environ.get("OA_TRAIN_TRACEBACK"):
        traceback.print_exception(problem)
    else:
        sys.stderr.write("This is a fault of oa_train or of a library; OA_TRAIN_TRACEBACK=1 shows where.\n")
    return FAULT


def _is_misconfiguration(problem: Exception) -> bool:
    return type(problem).__name__ == "MisconfigurationException"


def _say(message: str) -> None:
    sys.stderr.write(f"oa-train: error: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
