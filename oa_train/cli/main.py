"""Entry point of `oa-train`: which command, how loud, and what its errors become.

Torch and Lightning are imported by the commands that need them, so that help is quick.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
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
    UNREAD,
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
    "minimal": ("oa_train.cli.minimal", "minimal_command", "whether a circuit is minimal, and whether it is complete"),
    "convert": ("oa_train.cli.convert", "convert_command", "a circuit or constants of an earlier layout, anew"),
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
            _flush()
        except SystemExit as stop:  # --help, --version and --print_config end this way
            return _ended(stop)
        except BrokenPipeError:
            return _unread()
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
    """Status of a command that has asked to exit; Lightning does so after Ctrl-C and SIGTERM, rich when unread."""
    if type(stop).__name__ == "SIGTERMException" or stop.code == TERMINATED:
        number = getattr(stop, "signal", None)
        return _interrupted(stop, f"ended by {number.name if number is not None else 'SIGTERM'}", TERMINATED)
    if isinstance(stop.__context__, KeyboardInterrupt):
        return _interrupted(stop, "interrupted", INTERRUPTED)
    if isinstance(stop.__context__, BrokenPipeError):
        return _unread()
    if stop.code is None:
        return DONE
    return stop.code if isinstance(stop.code, int) else FAULT


def _flush() -> None:
    if sys.stdout is not None:  # as it is when the shell has closed it
        sys.stdout.flush()


def _unread() -> int:
    """Have Python's own flush at the end succeed, and return the status that a shell gives to a broken pipe."""
    said.info("nobody reads the output any more")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # what is no file, or closed, needs no end
            stream.flush()
            continue
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(nowhere, stream.fileno())
    return UNREAD


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
    notes = tuple(getattr(problem, "__notes__", ()))
    if isinstance(problem, OaTrainError):
        return _complain(str(problem), notes, problem, problem.exit_status)
    from oa_train.cli.messages import own_error

    own = own_error(problem)
    if own is not None:
        return _complain(str(own), notes, problem, own.exit_status)
    if _is_misconfiguration(problem):
        return _complain(str(problem), (), problem, MISTAKE)
    from oa_train.cli.faults import explain_fault, place_outside

    fault = explain_fault(problem)
    if fault is not None:
        status = _complain(str(fault), notes, problem, FAULT)
    else:
        place = place_outside(problem)
        whose = "This is a fault of oa_train or of a library" if place is None else f"It was raised {place}"
        words = f"{type(problem).__name__}: {problem}\n{whose}; OA_TRAIN_TRACEBACK=1 shows the way there."
        status = _complain(words, notes, problem, FAULT)
    if os.environ.get("OA_TRAIN_TRACEBACK"):
        traceback.print_exception(problem)
    return status


def _complain(message: str, notes: Sequence[str], problem: Exception, status: int) -> int:
    _say("\n".join([f"error: {message}", *notes]), problem)
    return status


def _is_misconfiguration(problem: Exception) -> bool:
    return type(problem).__name__ == "MisconfigurationException"


def _say(message: str, problem: Exception | None) -> None:
    """Say something on the error stream, and in the record with the traceback."""
    with suppress(OSError, AttributeError):  # it may be full or closed, and there is no other place
        sys.stderr.write(f"oa-train: {message}\n")
    said.error(message, exc_info=problem)


if __name__ == "__main__":
    sys.exit(main())
