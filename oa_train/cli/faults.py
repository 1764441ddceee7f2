"""Errors from outside this package: their messages, their exit statuses, and how to resume after them."""

import errno
import re
import signal
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import oa_train
from oa_train.errors import FAULT, MISTAKE, OaTrainError, RunError, causes
from oa_train.studies.run_folder import RunFolder
from oa_train.training.interruption import Stopped

# Meaning of a system error on a file, and what to do.
_OF_FILES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("The disk is full", "Make room"),
    errno.EDQUOT: ("The disk quota of this user is exhausted", "Make room"),
    errno.EFBIG: ("A file would be larger than this process may write", "Raise the limit (`ulimit -f`)"),
    errno.EROFS: ("The disk is read-only", "Make it writable"),
    errno.EACCES: ("A file or folder is not accessible to this user", "Change its permissions"),
    errno.EPERM: ("A file or folder is not accessible to this user", "Change its permissions"),
    errno.ENOENT: ("A file or folder is gone", "See who deletes or moves it"),
    errno.ESTALE: ("A file or folder is gone", "See who deletes or moves it"),
    errno.EIO: ("The disk has failed", "Have it checked"),
    errno.EMFILE: ("Too many files are open", "Raise the limit (`ulimit -n`)"),
    errno.ENFILE: ("Too many files are open", "Raise the limit of the system"),
}

# Writers that do not name their file, by a part of the path of their code.
_WRITERS = {
    "/tensorboard/": "the TensorBoard log (events.out.tfevents.*)",
    "/csv_logs.py": "metrics.csv",
    "/matplotlib/": "a figure",
}

_NO_MEMORY = re.compile(r"out of memory|allocate memory|enough memory|bad_alloc|unable to mmap|create a memory object")
_LOWER = """\
A step needs less with a smaller --data.batch_size, --model.samples_per_prompt (circuits) or --model.rows_per_run
(constants), --model.recompute true and --lm.dtype bfloat16; evaluation needs less with a smaller
--data.evaluation_batch_size. `oa-train inspect` estimates a step."""

_NO_PEER = re.compile(r"gloo/|connection (closed|reset) by peer|nccl (error|communicator)|broken pipe", re.IGNORECASE)
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


def explain(problem: Exception) -> tuple[int, str]:
    """Exit status and message for an error that is not one of this package."""
    own = own_error(problem)
    if own is not None:
        return own.exit_status, str(own)
    if _is_misconfiguration(problem):
        return MISTAKE, str(problem)
    for cause in causes(problem):
        for meaning in (_memory, _taken_port, _lost_peer, _file):
            message = meaning(cause)
            if message is not None:
                return FAULT, message
    place = _place_outside(problem)
    whose = "This is a fault of oa_train or of a library" if place is None else f"It was raised {place}"
    advice = "OA_TRAIN_TRACEBACK=1 shows the traceback."
    return FAULT, f"{type(problem).__name__}: {problem}\n{whose}; {advice}"


def own_error(problem: BaseException) -> OaTrainError | None:
    """The error of this package among the causes of another; the parser wraps what constructors raise."""
    return next((cause for cause in causes(problem) if isinstance(cause, OaTrainError)), None)


@contextmanager
def told_how_to_resume(
    run: Callable[[], RunFolder], resumed_from: Path | None = None, save_config: Callable[[], object] | None = None
) -> Iterator[None]:
    """Add to a fault or an interruption how to resume; the deletion of the run folder is a fault.

    Args:
        run: returns the run folder, which processes other than the first may learn only during the run.
        resumed_from: checkpoint from which this run itself was resumed.
        save_config: writes the configuration, for a folder that was deleted and made again; None in processes other
            than the first, which reports the faults that all of them meet.

    Raises:
        RunError: the folder was deleted, and nothing else has noticed.
    """
    try:
        yield
        if save_config is not None and not run().config_path.is_file():
            raise RunError(
                f"The folder {run().path} was deleted while the run wrote to it; what is left is incomplete."
            )
    except BaseException as problem:
        if save_config is not None and run().path.is_dir() and not run().config_path.is_file():
            with suppress(OSError):
                save_config()
        if _goes_on(problem, is_first=save_config is not None):
            for line in run().how_to_resume(resumed_from):
                problem.add_note(line)
        raise


def _goes_on(problem: BaseException, is_first: bool) -> bool:
    if not isinstance(problem, Exception):  # Ctrl-C and signals
        return is_first
    own = own_error(problem)
    return is_first and own.exit_status == FAULT if own is not None else not _is_misconfiguration(problem)


@contextmanager
def terminable(signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> Iterator[None]:
    """Raise an exception at a signal inside the context, as Python does at Ctrl-C but not at SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _terminate) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    del frame
    raise Stopped(signal.Signals(number))


def _is_misconfiguration(problem: Exception) -> bool:
    return type(problem).__name__ == "MisconfigurationException"


def _memory(problem: BaseException) -> str | None:
    kinds = {kind.__name__ for kind in type(problem).__mro__}
    is_memory = (
        bool(kinds & {"MemoryError", "OutOfMemoryError"})
        or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM)
        or (isinstance(problem, RuntimeError) and bool(_NO_MEMORY.search(str(problem))))
    )
    return f"Out of memory: {_first_sentence(problem)}\n{_LOWER}" if is_memory else None


def _is_distributed(problem: BaseException) -> bool:
    return any(kind.__name__ == "DistError" for kind in type(problem).__mro__)


def _taken_port(problem: BaseException) -> str | None:
    if not (_is_distributed(problem) and _PORT_TAKEN.search(str(problem))):
        return None
    return (
        f"The processes of this run cannot meet, because another program has their port: {_first_sentence(problem)}\n"
        "Wait until it has ended, or choose another port with the variable MASTER_PORT (torchrun: --master_port)."
    )


def _lost_peer(problem: BaseException) -> str | None:
    is_peer = isinstance(problem, RuntimeError) and bool(_NO_PEER.search(str(problem)))
    if not (_is_distributed(problem) or is_peer):
        return None
    return (
        "Another process of this run has ended, or cannot be reached any more, so this one cannot go on.\n"
        "If it printed nothing itself, it was killed: by a user, by the scheduler, or by the system for lack of "
        f"memory.\nThis process saw: {_first_sentence(problem)}"
    )


def _file(problem: BaseException) -> str | None:
    if not isinstance(problem, OSError) or problem.errno not in _OF_FILES:
        return None
    meaning, advice = _OF_FILES[problem.errno]
    files = [frame.filename for frame in traceback.extract_tb(problem.__traceback__)]
    writer = next((name for part, name in _WRITERS.items() if any(part in file for file in files)), None)
    name = problem.filename or writer
    where = f": {name} cannot be read or written" if name else ""
    return f"{meaning}{where} ({problem.strerror}).\n{advice}, or name another folder with --trainer.default_root_dir."


def _first_sentence(problem: BaseException) -> str:
    """First line of a library's message, without its advice to its own developers."""
    first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return re.sub(r"^\[[^\]]*\]\s*(err == 0\.\s*)?|(?<=\.) This is typically caused .*$", "", first)


def _place_outside(problem: BaseException) -> str | None:
    """Deepest function, file and line in the user's own code; None if all is ours, a library's or Python's."""
    paths = sysconfig.get_paths()
    libraries = [Path(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    known = [Path(oa_train.__file__).parent, *libraries]
    for frame in reversed(traceback.extract_tb(problem.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in known):
            return f"in {frame.name} ({path}, line {frame.lineno})"
    return None
