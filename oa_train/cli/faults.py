"""What a fault of the machine means, in words: a full disk, too little memory, a process or a folder that is gone."""

import errno
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import oa_train
from oa_train.cli.arguments import CONFIG_FILE
from oa_train.cli.interruption import way_on
from oa_train.cli.messages import own_error
from oa_train.errors import FAULT, RunError, causes

# What the system says of a file, what that means, and what to do.
_OF_FILES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("The disk is full", "Make room"),
    errno.EDQUOT: ("The disk space that this user may take up is full", "Make room"),
    errno.EFBIG: ("A file would be larger than this process may write", "Raise the limit (`ulimit -f`)"),
    errno.EROFS: ("The disk must not be written to", "Make it writable"),
    errno.EACCES: ("A file or folder must not be touched by this user", "Change its permissions"),
    errno.EPERM: ("A file or folder must not be touched by this user", "Change its permissions"),
    errno.ENOENT: ("A file or folder is gone", "See who deletes or moves it"),
    errno.ESTALE: ("A file or folder is gone", "See who deletes or moves it"),
    errno.EIO: ("The disk has failed", "Have it seen to"),
    errno.EMFILE: ("Too many files are open", "Raise the limit (`ulimit -n`)"),
    errno.ENFILE: ("Too many files are open", "Raise the limit of the system"),
}
_ELSEWHERE = "or name another folder with --trainer.default_root_dir"

# Writers that do not name their file, by a part of the path of their code.
_WRITERS = {
    "/tensorboard/": "the TensorBoard log (events.out.tfevents.*)",
    "/csv_logs.py": "metrics.csv",
    "/matplotlib/": "a figure",
}

_NO_MEMORY = re.compile(r"out of memory|allocate memory|enough memory|bad_alloc|unable to mmap|create a memory object")
_LOWER = """\
What a step needs falls with --data.batch_size, --model.samples_per_prompt (circuits) or --model.rows_per_run
(constants), --model.recompute true and --lm.dtype bfloat16; what evaluation needs falls with
--data.evaluation_batch_size. `oa-train inspect` estimates a step."""

_NO_PEER = re.compile(r"gloo/|connection (closed|reset) by peer|nccl (error|communicator)|broken pipe", re.IGNORECASE)
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)

Recognise = Callable[[BaseException], bool]
Say = Callable[[BaseException], str]


def explain_fault(problem: BaseException) -> RunError | None:
    """The error of this package that says what a fault of the machine means; None when it is none of these.

    Args:
        problem: what was raised; what it was made from is looked at as well.
    """
    for one in causes(problem):
        for recognise, say in FAULTS:
            if recognise(one):
                return RunError(say(one))
    return None


def place_outside(problem: BaseException) -> str | None:
    """Where an error went through code of the user's own, a task or a callback, say.

    Args:
        problem: what was raised.

    Returns:
        Function, file and line that lie deepest; None when all is code of this package, of a library or of Python.
    """
    for frame in reversed(traceback.extract_tb(problem.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in _known_folders()):
            return f"in {frame.name} ({path}, line {frame.lineno})"
    return None


@contextmanager
def faults_explained(
    run: Path, resumed_from: Path | None = None, save_config: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Have a fault say how the run goes on, and a run whose folder was deleted end as a fault.

    Args:
        run: run folder.
        resumed_from: checkpoint that this run itself goes on from.
        save_config: writes the configuration, for a folder that was deleted and made again.

    Raises:
        RunError: the folder was deleted, and nothing else has noticed.
    """
    try:
        yield
        if not (run / CONFIG_FILE).is_file():
            raise RunError(f"The folder {run} was deleted while the run wrote to it; what is there now is not whole.")
    except Exception as problem:
        if run.is_dir() and not (run / CONFIG_FILE).is_file():
            with suppress(OSError):
                save_config()
        if _is_fault(problem):
            for line in _way_on(run, resumed_from):
                problem.add_note(line)
        raise


@contextmanager
def lost_peers_explained(run: Callable[[], Path]) -> Iterator[None]:
    """Have a process that is not the first say how the run goes on after a fault that the others may not have.

    Nobody else may be left to say it. What all processes find together, a loss that is not finite say, the first says.

    Args:
        run: finds the run folder, which such a process may learn only during the run.
    """
    try:
        yield
    except Exception as problem:
        if own_error(problem) is None and _is_fault(problem):
            for line in _way_on(run(), None):
                problem.add_note(line)
        raise


def _is_fault(problem: Exception) -> bool:
    own = own_error(problem)
    return own.exit_status == FAULT if own is not None else type(problem).__name__ != "MisconfigurationException"


def _way_on(run: Path, resumed_from: Path | None) -> list[str]:
    if not (run / CONFIG_FILE).is_file():
        return [f"Nothing is left in {run}. Start again with the command that started this run."]
    return way_on(run, resumed_from)


def _is_memory(problem: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(problem).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return True
    if isinstance(problem, OSError):
        return problem.errno == errno.ENOMEM
    return isinstance(problem, RuntimeError) and bool(_NO_MEMORY.search(str(problem)))


def _say_memory(problem: BaseException) -> str:
    return f"The memory does not suffice: {_first_sentence(problem)}\n{_LOWER}"


def _is_taken_port(problem: BaseException) -> bool:
    return _is_distributed(problem) and bool(_PORT_TAKEN.search(str(problem)))


def _say_taken_port(problem: BaseException) -> str:
    return (
        f"The processes of this run cannot meet, because another program has their port: {_first_sentence(problem)}\n"
        "Wait until it has ended, or choose another port with the variable MASTER_PORT (torchrun: --master_port)."
    )


def _is_lost_peer(problem: BaseException) -> bool:
    return _is_distributed(problem) or (isinstance(problem, RuntimeError) and bool(_NO_PEER.search(str(problem))))


def _say_lost_peer(problem: BaseException) -> str:
    return (
        "Another process of this run has ended, or cannot be reached any more, so this one cannot go on.\n"
        "If it has said nothing itself, it was killed: by someone, by the scheduler, or by the system for lack of "
        f"memory.\nWhat this one saw: {_first_sentence(problem)}"
    )


def _is_distributed(problem: BaseException) -> bool:
    return any(kind.__name__ == "DistError" for kind in type(problem).__mro__)


def _is_file(problem: BaseException) -> bool:
    return isinstance(problem, OSError) and problem.errno in _OF_FILES


def _say_file(problem: BaseException) -> str:
    assert isinstance(problem, OSError)
    assert problem.errno is not None
    meaning, advice = _OF_FILES[problem.errno]
    name = problem.filename or _writer(problem)
    where = f": {name} cannot be read or written" if name else ""
    return f"{meaning}{where} ({problem.strerror}).\n{advice}, {_ELSEWHERE}."


def _writer(problem: BaseException) -> str | None:
    files = [frame.filename for frame in traceback.extract_tb(problem.__traceback__)]
    return next((name for part, name in _WRITERS.items() if any(part in file for file in files)), None)


def _first_sentence(problem: BaseException) -> str:
    """The first line of what a library says, without what it advises its own developers."""
    first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return re.sub(r"^\[[^\]]*\]\s*(err == 0\.\s*)?|(?<=\.) This is typically caused .*$", "", first)


def _known_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return [Path(oa_train.__file__).parent, *(Path(paths[name]) for name in names)]


# How each kind of fault is recognised, and what is said of it; the first that fits.
FAULTS: tuple[tuple[Recognise, Say], ...] = (
    (_is_memory, _say_memory),
    (_is_taken_port, _say_taken_port),
    (_is_lost_peer, _say_lost_peer),
    (_is_file, _say_file),
)
