"""Errors from outside this package: messages, exit statuses, and commands that resume."""

import errno
import re
import shutil
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import oa_train
from oa_train.errors import FAULT, MISTAKE, ConfigurationError, OaTrainError, RunError, causes
from oa_train.studies.run_folder import PIECES, RunFolder

# Advice on system errors about files.
_ELSEWHERE = "or name another folder with --trainer.default_root_dir"
_MISSING = "Check its path, and whether something deletes or moves it"
_OF_FILES: dict[int, str] = {
    errno.ENOSPC: f"Make room, {_ELSEWHERE}",
    errno.EDQUOT: f"Make room, {_ELSEWHERE}",
    errno.EFBIG: "Raise the limit of this process (`ulimit -f`)",
    errno.EROFS: f"Make it writable, {_ELSEWHERE}",
    errno.EACCES: f"Change its permissions, {_ELSEWHERE}",
    errno.EPERM: f"Change its permissions, {_ELSEWHERE}",
    errno.ENOENT: _MISSING,
    errno.ESTALE: _MISSING,
    errno.EIO: f"The disk has failed: have it checked, {_ELSEWHERE}",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "Raise the system's limit of open files",
}

# Names of files whose writers do not name them in errors, by a part of the path of the writer's code.
_WRITERS = {
    "/tensorboard/": "the TensorBoard log (events.out.tfevents.*)",
    "/csv_logs.py": "metrics.csv",
    "/matplotlib/": "a figure",
}

_NO_MEMORY = re.compile(r"out of memory|allocate memory|enough memory|bad_alloc|unable to mmap|create a memory object")
_LOWER = """\
A step needs less with a smaller --data.batch_size, --model.samples_per_prompt (circuits) or --model.rows_per_run
(constants), --model.recompute true and --lm.dtype bfloat16; evaluation needs less with a smaller
--data.evaluation_batch_size, a study with a smaller fit.rows_per_run, a scan or interact also with a smaller
parts_at_once. `oa-train inspect` estimates a step."""

_NO_PEER = re.compile(r"gloo/|connection (closed|reset) by peer|nccl (error|communicator)|broken pipe", re.IGNORECASE)
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


def explain(problem: Exception) -> tuple[int, str]:
    """Exit status and message for an error, whether of this package or from outside."""
    own = own_error(problem)
    if own is not None:
        return own.exit_status, str(own)
    if type(problem).__name__ == "MisconfigurationException":
        return MISTAKE, str(problem)
    if isinstance(problem, ValueError) and str(problem).startswith("loaded state dict "):  # an optimiser's
        return MISTAKE, f"The checkpoint is damaged or of another version; torch says of its optimiser: {problem}."
    for cause in causes(problem):
        message = _machine(cause) or _file(cause)
        if message is not None:
            return FAULT, message
    text = users_own(problem) or f"{type(problem).__name__}: {problem}\nThis is a fault of oa_train or of a library"
    return FAULT, f"{text}; OA_TRAIN_TRACEBACK=1 shows the traceback."


def own_error(problem: BaseException | None) -> OaTrainError | None:
    """The error of this package among the causes of another error; the parser wraps errors from constructors."""
    chain = () if problem is None else causes(problem)
    return next((cause for cause in chain if isinstance(cause, OaTrainError)), None)


def users_own(problem: BaseException) -> str | None:
    """Message on the first cause that was raised in the user's own code, with its place; None if there is none."""
    for cause in reversed(list(causes(problem))):
        place = place_outside(cause)
        if place is not None:
            return f"{type(cause).__name__}: {cause}\nIt was raised {place}"
    return None


def place_outside(problem: BaseException) -> str | None:
    """Deepest function, file and line in the user's own code; None if there is no such frame."""
    paths = sysconfig.get_paths()
    libraries = [Path(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    known = [Path(oa_train.__file__).parent, *libraries]
    for frame in reversed(traceback.extract_tb(problem.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in known):
            return f"in {frame.name} ({path}, line {frame.lineno})"
    return None


@contextmanager
def building() -> Iterator[None]:
    """Turn errors from constructors, including the user's own, into mistakes in the options."""
    try:
        yield
    except Exception as problem:
        text = users_own(problem)
        is_mistake = text is not None or isinstance(problem, ValueError | TypeError)
        if own_error(problem) is not None or not is_mistake or any(map(_machine, causes(problem))):
            raise
        text = f"An object cannot be built from these options: {reasons(str(problem))}" if text is None else f"{text}."
        raise ConfigurationError(text) from problem


def reasons(problem: str) -> str:
    """The reasons in a message of the option parser, without those that only name a type."""
    lines = [line.strip(" -") for line in problem.splitlines()]
    skipped = ("Parser key", "Does not validate", "Subtypes", "Errors", "Problem with", "Expected a ", "Given value")
    return "; ".join(line for line in lines if line and not line.startswith(skipped)) or problem.strip()


@contextmanager
def told_how_to_resume(
    run: Callable[[], RunFolder], resumed_from: Path | None = None, save_config: Callable[[], object] | None = None
) -> Iterator[None]:
    """Add to a fault or an interruption how to resume; deletion of the run folder counts as a fault.

    Args:
        run: returns the run folder, which processes other than the first one may learn only during the run.
        resumed_from: checkpoint from which this run itself was resumed.
        save_config: writes the configuration again if the folder was deleted; None in all processes except the main
            one, which reports faults that all of them meet.
    """
    try:
        yield
        if save_config is not None and not run().config_path.is_file():
            raise RunError(
                f"The folder {run().path} was deleted while the run wrote to it; the remaining files are incomplete."
            )
    except BaseException as problem:
        if save_config is not None and run().path.is_dir() and not run().config_path.is_file():
            with suppress(OSError):
                save_config()
        # Other processes report only what the first one cannot know.
        goes_on = not isinstance(problem, Exception) or explain(problem)[0] == FAULT
        if goes_on and (save_config is not None or (isinstance(problem, Exception) and own_error(problem) is None)):
            for line in run().how_to_resume(resumed_from):
                problem.add_note(line)
        raise


class Claim:
    """A new run folder, and the folders above it that had to be made."""

    def __init__(self, root: Path, experiment: str) -> None:
        folders = (root / experiment / "version", *(root / experiment / "version").parents)
        self._kept = next(folder for folder in folders if folder.exists())
        self._begun = time.time()
        self.run = RunFolder.create(root, experiment)

    @contextmanager
    def given_up_after_a_refusal(self) -> Iterator[None]:
        """Remove the folders if options turn out to be wrong before anything was trained."""
        try:
            yield
        except Exception as problem:
            refused = isinstance(problem, ImportError) or explain(problem)[0] == MISTAKE
            # An older checkpoint is a copy of the resumed run's best.
            done = [
                *self.run.path.glob("checkpoints/*.ckpt"),
                *self.run.path.glob(f"studies/*/{PIECES}/*.safetensors"),
            ]
            if refused and not any(path.stat().st_mtime >= self._begun for path in done):
                shutil.rmtree(self.run.path, ignore_errors=True)
                with suppress(OSError):  # another run may have made a folder there
                    for folder in self.run.path.parents:
                        if folder == self._kept:
                            break
                        folder.rmdir()
            raise


def _machine(problem: BaseException) -> str | None:
    """Message for a lack of memory or for lost processes; None for other errors."""
    text, is_runtime = str(problem), isinstance(problem, RuntimeError)
    if (
        isinstance(problem, MemoryError)
        or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM)
        or (is_runtime and _NO_MEMORY.search(text))
    ):
        return f"Out of memory: {_first_sentence(problem)}\n{_LOWER}"
    is_distributed = any(kind.__name__ == "DistError" for kind in type(problem).__mro__)
    if is_distributed and _PORT_TAKEN.search(text):
        return (
            "The processes of this run cannot connect, because another program uses their port: "
            f"{_first_sentence(problem)}\nWait until it has ended, or choose another port with the variable "
            "MASTER_PORT (torchrun: --master_port)."
        )
    if is_distributed or (is_runtime and _NO_PEER.search(text)):
        return (
            "Another process of this run has ended or can no longer be reached, so this one cannot continue.\n"
            "If it printed nothing itself, it was killed: by a user, by the scheduler, or by the system when memory "
            f"ran out.\nThis process saw: {_first_sentence(problem)}"
        )
    return None


def _file(problem: BaseException) -> str | None:
    """Message for a system error about a file; None for others, and for files that the user's own code misses."""
    if not isinstance(problem, OSError) or problem.errno not in _OF_FILES:
        return None
    if problem.errno == errno.ENOENT and place_outside(problem) is not None:
        return None
    files = [frame.filename for frame in traceback.extract_tb(problem.__traceback__)]
    writer = next((name for part, name in _WRITERS.items() if any(part in file for file in files)), None)
    name = problem.filename or writer
    where = f"{name} cannot be read or written: " if name else ""
    return f"{where}{problem.strerror}.\n{_OF_FILES[problem.errno]}."


def _first_sentence(problem: BaseException) -> str:
    """First line of a library's message, without its advice to its own developers."""
    first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return re.sub(r"^\[[^\]]*\]\s*(err == 0\.\s*)?|(?<=\.) This is typically caused .*$", "", first)
