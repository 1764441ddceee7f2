"""Entry point of `oa-train`: runs the command, and turns errors into messages and exit statuses.

Torch and Lightning are imported by the commands that need them, so that help and many error messages are quick.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from oa_train import __version__, errors
from oa_train.cli.precheck import check_files
from oa_train.cli.run_log import log, recording
from oa_train.cli.streams import safe_streams
from oa_train.errors import (
    DONE,
    FAULT,
    INTERRUPTED,
    MISTAKE,
    TERMINATED,
    UNREAD,
    ConfigurationError,
    nearest_names,
    suggestion,
)
from oa_train.studies.registry import STUDIES

# Commands by name: the function, imported when it is used, and the line in the overview.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("oa_train.cli.demo.demo", "train, finish and compare on the built-in model, in minutes"),
    "fit": ("oa_train.cli.fit.fit", "train masks and constants; --ckpt_path resumes"),
    "validate": ("oa_train.cli.fit.validate", "evaluate a run on its validation prompts"),
    "test": ("oa_train.cli.fit.test", "evaluate a run on held-out prompts"),
    **STUDIES,
    "study": ("oa_train.cli.study_command.own_study", "a study of your own: study package.module.Class"),
    "runs": ("oa_train.cli.runs.runs", "list runs with their main results"),
    "check-data": (
        "oa_train.cli.check_data.check_data",
        "prompts as a model reads them, and its accuracy on them",
    ),
    "convert": ("oa_train.cli.convert.convert_command", "convert a circuit or constants of an earlier layout"),
    "inspect": ("oa_train.cli.inspecting.inspect_command", "parts, edges and memory of a model; --check tests it"),
}

QUIET = ("-q", "--quiet")

# Options that only ask for output, to which --quiet does not apply.
_ASKING = ("-h", "--help", "--version", "--print_config", "--json")

# Number of characters kept at the beginning and end of a long line of a message, which may quote a text.
_HEAD, _TAIL = 700, 300


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the process; returns the exit status."""
    line = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in line if word not in QUIET]
    quiet = len(words) < len(line) and not any(word.split("=")[0] in _ASKING for word in words)
    with recording(line), safe_streams(quiet) as (output, error):
        status, message = DONE, ""
        try:
            _run(words)
        except (Exception, KeyboardInterrupt, SystemExit) as problem:  # noqa: BLE001 (where errors become messages)
            status, message = _ending(problem)
            log.error(message or "ended", exc_info=problem if status in (MISTAKE, FAULT) else None)
            if message:
                error.write(f"oa-train: {message}\n")
                if status == FAULT and os.environ.get("OA_TRAIN_TRACEBACK"):
                    error.write("".join(traceback.format_exception(problem)))
        output.flush()
        if status == DONE and output.full:
            status = FAULT
            error.write("oa-train: error: The disk is full, so the output is incomplete.\n")
    return UNREAD if status == DONE and output.unread else status


def run_command(name: str, words: Sequence[str]) -> object:
    """Run a command, a key of `COMMANDS`, and return what it returns."""
    check_files(words)
    if name in STUDIES:
        from oa_train.cli.study_command import run_study

        return run_study(STUDIES[name][0], list(words))
    module, _, function = COMMANDS[name][0].rpartition(".")
    command: Callable[[list[str]], object] = getattr(import_module(module), function)
    return command(list(words))


def _run(words: Sequence[str]) -> None:
    first = words[0] if words else ""
    if first in COMMANDS:
        run_command(first, words[1:])
    elif first in ("-h", "--help", "--version"):
        _overview().parse_args([first])
    elif first.startswith("-"):
        near = suggestion(first, ("--help", "--version", *QUIET[1:]))
        sentences = [f"There is no option {first} before the command.", near, "See oa-train --help."]
        raise ConfigurationError(" ".join(filter(None, sentences)))
    elif first:
        raise ConfigurationError(f"There is no command {first!r}. {nearest_names(first, COMMANDS)}")
    else:
        raise ConfigurationError(f"No command was given.\nCommands: {', '.join(COMMANDS)}. See oa-train --help.")


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oa-train",
        description="Learned ablations and sparse circuit masks for Hugging Face transformers.",
        epilog="`oa-train COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"oa-train {__version__}")
    # Removed from the command line before any parser sees it; added only for --help.
    parser.add_argument(*QUIET, action="store_true", help="with any command: print nothing but errors")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _ending(problem: BaseException) -> tuple[int, str]:
    """Exit status and message of what ended a command."""
    notes = getattr(problem, "__notes__", ())
    if isinstance(problem, SystemExit) and not isinstance(problem.__context__, KeyboardInterrupt):
        if problem.code == TERMINATED or type(problem).__name__ == "SIGTERMException":
            stopped = getattr(problem, "signal", None)
            return TERMINATED, "\n".join([f"ended by {stopped.name if stopped is not None else 'SIGTERM'}.", *notes])
        code = problem.code  # of --help, --version and --print_config, or a library's own
        return (DONE if code is None else code if isinstance(code, int) else FAULT), ""
    if not isinstance(problem, Exception):
        return INTERRUPTED, "\n".join(["interrupted.", *notes])
    if isinstance(problem, errors.OaTrainError):
        status, message = problem.exit_status, str(problem)
    else:
        from oa_train.cli.faults import explain

        status, message = explain(problem)
    return status, "\n".join([*map(_cut, f"error: {message}".split("\n")), *notes])


def _cut(line: str) -> str:
    if len(line) <= _HEAD + _TAIL:
        return line
    return f"{line[:_HEAD]} ... [{len(line) - _HEAD - _TAIL:,} characters] ... {line[-_TAIL:]}"


if __name__ == "__main__":
    sys.exit(main())
