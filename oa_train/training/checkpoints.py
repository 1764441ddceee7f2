"""Training checkpoints: written whole, read without running code, refused when they belong to something else."""

import io
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from oa_train.errors import CheckpointError, RunError
from oa_train.files import replace_file

# Where a checkpoint says what it is of; next to Lightning's own keys.
IDENTITY_KEY = "oa_train"


# What reading a damaged file can end in.
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    OSError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, waits for the disk and renames it.

    A process that is killed while writing leaves the previous checkpoint as it was. A folder that was deleted since
    something was written to it is made again, so that the state is safe; then the run is ended, because what else the
    folder held is lost, and it cannot be told what more is about to be deleted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[Path] = set()

    def make_folder(self, folder: Path) -> None:
        """Make a folder for checkpoints; from now on it is noticed when it is deleted.

        Raises:
            RunError: it cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise RunError(f"The folder {folder} cannot be made: {problem}") from problem
        self._folders.add(folder)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            RunError: the file cannot be written, and an earlier one of that name is left as it was; or it was
                written to a folder that had been deleted meanwhile.
        """
        del storage_options
        target = Path(path)
        blob = io.BytesIO()
        torch.save(checkpoint, blob)
        deleted = target.parent in self._folders and not target.parent.is_dir()
        self.make_folder(target.parent)
        try:
            replace_file(target, blob.getvalue())
        except OSError as problem:
            untouched = "The checkpoint before it is untouched; make" if target.is_file() else "Make"
            raise RunError(
                f"The checkpoint {target} cannot be written: {problem.strerror or problem}.\n{untouched} room or "
                "choose another folder (--trainer.default_root_dir)."
            ) from problem
        if deleted:
            raise RunError(
                f"The folder {target.parent} was deleted while the run wrote to it.\nThe state of step "
                f"{checkpoint.get('global_step')} was written to it again, and the run was ended there; what else the "
                "folder held is gone."
            )

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; tensors and plain types only, whatever `weights_only` says."""
        del weights_only
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Raises:
        CheckpointError: the file is missing, damaged, or no checkpoint of this package.
    """
    if not path.is_file():
        what = f"{path} is a folder and no checkpoint" if path.is_dir() else f"There is no checkpoint at {path}"
        raise CheckpointError(f"{what}. {_others(path)}".rstrip())
    try:
        _check_sums(path)
        with warnings.catch_warnings():
            # Torch warns about what it finds in files that are no checkpoints, and then refuses them.
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except _DAMAGE as problem:
        raise CheckpointError(
            f"{path} is truncated, damaged, or no checkpoint at all.\nExpected a file that `oa-train fit` wrote "
            f"(checkpoints/best.ckpt or checkpoints/last.ckpt of a run). {_others(path)}".rstrip()
        ) from problem
    if not isinstance(checkpoint, dict) or IDENTITY_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} is no checkpoint of oa_train; expected checkpoints/best.ckpt or checkpoints/last.ckpt of a run."
        )
    return checkpoint


def _check_sums(path: Path) -> None:
    """Compare every part of a checkpoint with its checksum, which torch writes and does not read.

    Raises:
        BadZipFile: a part is damaged, or the file is none that torch wrote.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} is damaged")


def check_identity(given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare what a checkpoint is of with what is to be resumed.

    Args:
        given: identity stored in the checkpoint.
        expected: identity of the module and its task.

    Raises:
        CheckpointError: they differ; every difference is listed.
    """
    differences = [line for name in expected for line in _differences(name, given.get(name), expected[name])]
    if differences:
        raise CheckpointError(
            "The checkpoint belongs to another experiment:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nResume with the configuration it was made with (config.yaml in its run folder)."
        )


def _differences(name: str, given: Any, expected: Any) -> list[str]:
    if isinstance(given, Mapping) and isinstance(expected, Mapping):
        return [line for key in expected for line in _differences(f"{name}.{key}", given.get(key), expected[key])]
    return [] if given == expected else [f"{name}: the checkpoint has {given}, this configuration {expected}"]


def _others(path: Path) -> str:
    folder, patterns = (path, ("*.ckpt", "checkpoints/*.ckpt")) if path.is_dir() else (path.parent, ("*.ckpt",))
    found = sorted(other for pattern in patterns for other in folder.glob(pattern) if other != path)
    names = [str(other.relative_to(folder)) for other in found]
    return f"In {folder}: {', '.join(names[:10])}." if names else ""
