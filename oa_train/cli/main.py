"""Entry point of `oa-train`: which command, how loud, and what its errors become.

Torch and Lightning are imported by the commands that need them, so that help is quick.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import NoReturn

from oa_train import __version__
from oa_train.cli.record import recording, said
from oa_train.errors import (
    DONE,
    FAULT,
    INTERRUPTED,
    MISTAKE,
    TERMINATED,
    ConfigurationError,
    OaTrainError,
    nearest_names,
)

Command = Callable[[list[str]], object]

# Name, module, function, and what the overview says.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("oa_train.cli.demo", "demo", "the whole way on the built-in model, in a few minutes"),
    "fit": ("oa_train.cli.fitting", "fit", "train masks and constants; --ckpt_path resumes"),
    "validate": ("oa_train.cli.fitting", "validate", "evaluate a run on its validation prompts"),
    "test": ("oa_train.cli.fitting", "test", "evaluate a run on held-out prompts"),
    "compare": (
        "oa_train.cli.comparing",
        "compare_command",
        "learned ablation against all others, for one run or several",
    ),
    "inspect": ("oa_train.cli.inspecting", "inspect_command", "parts, edges and memory of a model; --check tests it"),
}

QUIET = ("-q", "--quiet")

# These ask for output and nothing else, so they are never quiet.
_ASKING = ("-h", "--help", "--version", "--print_config", "--json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status of the process.

    Args:
        argv: command line without the program's name; that of the process by default.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in given if word not in QUIET]
    asking = any(word.split("=")[0] in _ASKING for word in words)
    with recording(given):
        try:
            with _silence(len(words) < len(given) and not asking):
                _run(words)
        except SystemExit as stop:  # --help, --version and --print_config end this way
            return _ended(stop)
        except KeyboardInterrupt as stop:
            return _interrupted(stop, "interrupted", INTERRUPTED)
        except Exception as problem:  # noqa: BLE001 (the one place where errors become messages)
            return _report(problem)
        return DONE


def _run(words: Sequence[str]) -> None:
    parser = _overview()
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        sentence = nearest_names(words[0], ("--help", "--version", *QUIET[1:]))
        near = f" {sentence}" if sentence.startswith("Did you mean") else ""
        raise ConfigurationError(f"There is no option {words[0]} before the command.{near} See oa-train --help.")
    chosen = parser.parse_args(words[:1])
    module, function, _ = COMMANDS[chosen.command]
    command: Command = getattr(import_module(module), function)
    command(list(words[1:]))


@contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    if not quiet:
        yield
        return
    with redirect_stdout(_Nowhere()), redirect_stderr(_Nowhere()):
        yield


class _Nowhere(io.TextIOBase):
    """Swallows text. Unlike a file it is never closed, so that a library may keep it."""

    def write(self, text: str) -> int:
        return len(text)


def _ended(stop: SystemExit) -> int:
    """Status of a command that has asked to exit; Lightning does so after Ctrl-C and SIGTERM."""
    if type(stop).__name__ == "SIGTERMException" or stop.code == TERMINATED:
        return _interrupted(stop, "ended by SIGTERM", TERMINATED)
    if isinstance(stop.__context__, KeyboardInterrupt):
        return _interrupted(stop, "interrupted", INTERRUPTED)
    if stop.code is None:
        return DONE
    return stop.code if isinstance(stop.code, int) else FAULT


def _interrupted(stop: BaseException, what: str, status: int) -> int:
    _say("\n".join([f"{what}.", *getattr(stop, "__notes__", ())]), None)
    return status


def _overview() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="oa-train",
        description="Learned ablations and sparse circuit masks for Hugging Face transformers.",
        epilog="`oa-train COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"oa-train {__version__}")
    # Taken out of the command line before any parser sees it; here only to be listed.
    parser.add_argument(*QUIET, action="store_true", help="with any command: say nothing but errors")
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
        raise ConfigurationError(f"No command was given.\nCommands: {', '.join(COMMANDS)}. See oa-train --help.")


def _report(problem: Exception) -> int:
    if isinstance(problem, OaTrainError):
        _say(f"error: {problem}", problem)
        return problem.exit_status
    from oa_train.cli.messages import own_error

    own = own_error(problem)
    if own is not None:
        return _report(own)
    if _is_misconfiguration(problem):
        _say(f"error: {problem}", problem)
        return MISTAKE
    _say(f"error: {type(problem).__name__}: {problem}", problem)
    if os.environ.get("OA_TRAIN_TRACEBACK"):
        traceback.print_exception(problem)
    else:
        sys.stderr.write("This is a fault of oa_train or of a library; OA_TRAIN_TRACEBACK=1 shows where.\n")
    return FAULT


def _is_misconfiguration(problem: Exception) -> bool:
    return type(problem).__name__ == "MisconfigurationException"


def _say(message: str, problem: Exception | None) -> None:
    """Say something on the error stream, and in the record with the traceback."""
    sys.stderr.write(f"oa-train: {message}\n")
    said.error(message, exc_info=problem)


if __name__ == "__main__":
    sys.exit(main())
