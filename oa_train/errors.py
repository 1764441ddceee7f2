"""Every error that `oa_train` raises on purpose.

A message says in its first line what is wrong, then what was expected and what to do about it. `exit_status` is what
the command line returns: 2 for a mistake that the user can fix before anything runs, 1 for a fault while running.
Each class also derives from a built-in exception, so that callers who do not know this module can still catch it.

The docstrings are the manual: `make docs` writes docs/errors.md from them.
"""

import difflib
from collections.abc import Iterable, Iterator

DONE, FAULT, MISTAKE, INTERRUPTED, UNREAD, TERMINATED = 0, 1, 2, 130, 141, 143

EXIT_STATUSES: dict[int, str] = {
    DONE: "done",
    FAULT: "a fault while running: not finite, disk full, out of memory, another process gone, an error of a library",
    MISTAKE: "a mistake in options, configuration, model, task or files; nothing is left behind",
    INTERRUPTED: "interrupted with Ctrl-C; the message holds the command that resumes the run",
    UNREAD: "the reader of the output has exited, as in `oa-train inspect | head -1`; there is no message",
    TERMINATED: "ended by SIGTERM, or in a SLURM job by SIGUSR1; the message holds the command that resumes the run",
}


class OaTrainError(Exception):
    """Any error that this package raises on purpose.

    What to do: catch this one in a program that goes on when one of several runs fails; on the command line read the
    first line of the message.

    Attributes:
        exit_status: status of the process when the error ends a command.
    """

    exit_status = MISTAKE

    def __str__(self) -> str:
        # KeyError would show the repr of its argument, which turns line breaks into "\n".
        return str(self.args[0]) if self.args else ""


class ConfigurationError(OaTrainError, ValueError):
    """An option or argument is missing, unknown, or has a value that cannot work.

    What to do: change what the first line names. `oa-train COMMAND --help` lists the options of a command,
    `--print_config` shows the configuration that results from a file and options together.
    """


class UnknownNameError(OaTrainError, KeyError):
    """A name is unknown.

    What to do: take one of the names that the message lists, the nearest ones first.
    """


class ModelError(OaTrainError, ValueError):
    """A model cannot be loaded, or is of a family that is not in the table.

    What to do: check `lm.name` (a built-in model, a local folder that `save_pretrained` wrote, or a Hub id) and
    whether the Hub can be reached; docs/extending.md says how a family is added.
    """


class TaskError(OaTrainError, ValueError):
    """A task cannot be posed to this tokenizer or with these options.

    What to do: choose a model whose tokenizer holds the words that the message names, another task, or looser options
    of the task.
    """


class ArtefactError(OaTrainError, ValueError):
    """A file or folder is missing, damaged, of another kind, or belongs to another model.

    What to do: check the path. What is damaged is made again by the command that wrote it; a run that was cut off is
    finished by `oa-train fit --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt`.
    """


class CheckpointError(ArtefactError):
    """A training checkpoint is missing, damaged, or belongs to another model, component set or task.

    What to do: resume with the configuration that the checkpoint was made with, `config.yaml` in its run folder, and
    with `best.ckpt` when `last.ckpt` is damaged.
    """


class NotFiniteError(OaTrainError, ArithmeticError):
    """A loss, gradient or trained tensor is NaN or infinite.

    What to do: lower the learning rates, clip gradients (`--trainer.gradient_clip_val 1.0`) or train in float32, and
    resume from the last checkpoint; where the message says that the frozen model itself is at fault, fix the model.
    """

    exit_status = FAULT


class RunError(OaTrainError, RuntimeError):
    """Something failed while a job was running.

    What to do: see to what the message names (a full disk, say) and resume from the last checkpoint, with the command
    that the message ends with.
    """

    exit_status = FAULT


def causes(problem: BaseException) -> Iterator[BaseException]:
    """An error and the chain of its causes and contexts, each once.

    An error that a thread stores and raises again can be its own context: then the chain is a cycle.
    """
    seen: set[int] = set()
    error: BaseException | None = problem
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Question "Did you mean a, b?" with up to three valid names near one that is not; empty if none is near."""
    names = list(dict.fromkeys(valid))
    # The same in another case, or the beginning of a name, is near as well.
    near = difflib.get_close_matches(name, names) or [
        known for known in names if name and known.lower().startswith(name.lower())
    ]
    return f"Did you mean {', '.join(near[:3])}?" if near else ""


def nearest_names(name: str, valid: Iterable[str], heading: str = "Valid names") -> str:
    """Sentence about a name that is not valid: a `suggestion`, else the first twenty names under a heading."""
    names = list(dict.fromkeys(valid))
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return suggestion(name, names) or f"{heading}: {shown}."


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UnknownNameError:
    """Error for a name that is not valid; `kind` says of what, as in "component"."""
    return UnknownNameError(f"There is no {kind} named {name!r}. {nearest_names(name, valid)}")
