"""Files and folders that are written completely or not at all, and claimed by one process."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from oa_train.errors import ArtefactError, RunError


def make_next_folder(parent: Path, prefix: str) -> Path:
    """Make `<parent>/<prefix>_<N>` with the first free number; two processes never get the same one.

    Raises:
        RunError: the folder cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            folder = parent / f"{prefix}_{number}"
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as problem:
        raise RunError(f"No folder can be made in {parent}: {problem}") from problem
    raise AssertionError("unreachable")


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk.

    Raises:
        OSError: it cannot be written; the error names the file, which the system does only if it cannot be opened.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        problem.filename = problem.filename or str(path)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: readers, even after a crash, see the old content or the new one, never a part of it.

    Raises:
        OSError: it cannot be written; the error names the file, and the old content is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(path)) from problem  # not the temporary name
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder whole or not at all (temporary name, sync, rename), and make its parents.

    Raises:
        ArtefactError: the folder exists already.
        RunError: it cannot be written; no part of it is left behind.
    """
    if folder.exists():
        raise ArtefactError(f"{folder} exists already and results are never overwritten; name another folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            temporary.chmod(0o755)
            for name, content in files.items():
                write_synced(temporary / name, content)
            temporary.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as problem:
        raise RunError(f"{folder} cannot be written: {problem.strerror or problem}.") from problem


def sync_folder(folder: Path) -> None:
    """Wait until the entries of a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; NaN is refused, because it is not JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Raises:
        ArtefactError: the file cannot be read, or does not hold a mapping.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ArtefactError(f"{path} cannot be read: {problem}") from problem
    if not isinstance(document, dict):
        raise ArtefactError(f"{path} holds a {type(document).__name__}; expected named values.")
    return document
