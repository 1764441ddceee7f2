"""Training checkpoints: written atomically, read without running code, refused if they are of another experiment."""

import io
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from packaging.version import Version

from oa_train.artefacts import COUNT, FREE, SIZE, Schema, mismatch
from oa_train.errors import CheckpointError, RunError
from oa_train.files import replace_file

# Key of the identity and settings in a checkpoint, next to Lightning's own keys.
IDENTITY_KEY = "oa_train"
_VERSION_KEY = "pytorch-lightning_version"

# The file in which Lightning's notebook strategies hand the trained tensors, and nothing else, to the first process.
HANDED_OVER = ".temp.ckpt"

_COUNTS: Schema = {"ready": COUNT, "completed": COUNT, str: COUNT}
_PROGRESS: Schema = {"total": _COUNTS, "current": _COUNTS}
_BATCHES: Schema = _PROGRESS | {"is_last_batch": bool}
_NUMBER: Schema = (float, COUNT)
_GROUP: Schema = {
    "params": [COUNT],
    "lr": _NUMBER,
    "betas?": [_NUMBER],
    **dict.fromkeys(("eps?", "weight_decay?"), _NUMBER),
    **dict.fromkeys(("amsgrad?", "maximize?", "capturable?", "differentiable?"), bool),
    **dict.fromkeys(("foreach?", "fused?"), (bool, None)),
    str: object,
}
_LOADER: Schema = {"given": COUNT, "given_in_epoch": COUNT, "world_size": SIZE, str: object}
# A checkpoint without all of these was written with `save_weights_only`: for evaluation, not for a resume.
_FOR_A_RESUME: dict[str, Schema] = {
    "callbacks": {str: FREE},
    "optimizer_states": [{"state": dict, "param_groups": [_GROUP], str: object}],
    "lr_schedulers": [FREE],
}
_CHECKPOINT: Schema = {
    IDENTITY_KEY: {
        "identity": FREE,
        "settings": FREE,
        "epoch_length?": COUNT,
        "figures?": {str: (float, int)},
        "gradients?": {str: torch.Tensor},
        "optimisation?": [str],
        str: object,
    },
    "state_dict": {str: torch.Tensor},
    _VERSION_KEY: str,
    "epoch": COUNT,
    "global_step": COUNT,
    "loops": {
        "fit_loop": {
            "state_dict": {"combined_loader?": [_LOADER], str: object},
            "epoch_progress": _PROGRESS,
            "epoch_loop.state_dict": {"_batches_that_stepped": COUNT, str: object},
            "epoch_loop.batch_progress": _BATCHES,
            "epoch_loop.scheduler_progress": _PROGRESS,
            "epoch_loop.automatic_optimization.optim_progress": {
                "optimizer": {"step": _PROGRESS, "zero_grad": _PROGRESS}
            },
            "epoch_loop.manual_optimization.optim_step_progress": _PROGRESS,
            "epoch_loop.val_loop.batch_progress": _BATCHES,
            str: object,
        },
        str: FREE,
    },
    **{f"{key}?": schema for key, schema in _FOR_A_RESUME.items()},
    str: object,
}


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, waits for the disk and renames it.

    A process that is killed while writing leaves the previous checkpoint intact. A folder that was deleted since the
    last write is recreated, so the state is safe; then the run ends, because the folder's other files are lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[Path] = set()

    def make_folder(self, folder: Path) -> None:
        """Make a folder for checkpoints, and watch for its deletion from now on.

        Raises:
            RunError: the folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise RunError(f"The folder {folder} cannot be made: {problem}") from problem
        self._folders.add(folder)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            RunError: the file cannot be written (an earlier one is untouched), or its folder had been deleted.
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
                f"{checkpoint.get('global_step')} was written to it again, and the run was ended there; the folder's "
                "other files are lost."
            )

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, or the file that a notebook's process hands over: tensors and plain types only."""
        del weights_only
        if Path(path).name == HANDED_OVER:
            state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
            return state
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this package.
    """
    if not path.is_file():
        state = f"{path} is a folder, not a checkpoint" if path.is_dir() else f"There is no checkpoint at {path}"
        raise CheckpointError(f"{state}. {_others(path)}".rstrip())
    try:
        _check_zip(path)
        with warnings.catch_warnings():
            # Torch warns about the contents of files that are not checkpoints, and then refuses them.
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        problem = _mistake(checkpoint)
    except Exception as error:  # a damaged file makes torch raise errors of almost any kind
        raise CheckpointError(
            f"{path} is truncated, damaged, or no checkpoint at all.\nExpected a file that `oa-train fit` wrote "
            f"(checkpoints/best.ckpt or checkpoints/last.ckpt of a run). {_others(path)}".rstrip()
        ) from error
    if problem is not None:
        raise CheckpointError(
            f"{path} is no checkpoint of oa_train: {problem}.\nExpected checkpoints/best.ckpt or "
            "checkpoints/last.ckpt of a run."
        )
    content: dict[str, Any] = checkpoint
    return content


def _check_zip(path: Path) -> None:
    """Compare every part of a checkpoint with its checksum, which torch writes but does not verify.

    Raises:
        BadZipFile: a part is damaged, or compressed, in which case it could need any amount of memory.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
        if compressed or sum(part.file_size for part in parts) > path.stat().st_size:
            raise zipfile.BadZipFile("torch does not compress what it saves")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} is damaged")


def _mistake(checkpoint: Any) -> str | None:
    """The first reason why `checkpoint` is not a valid checkpoint, in words; None if it is one."""
    problem = mismatch(checkpoint, _CHECKPOINT, "its content")
    if problem is not None:
        return problem
    missing = [key for key in _FOR_A_RESUME if key not in checkpoint]
    if 0 < len(missing) < len(_FOR_A_RESUME):
        return f"its content lacks {' and '.join(missing)}"
    written, own = checkpoint[_VERSION_KEY], lightning.__version__
    if Version(written).major != Version(own).major:  # Lightning would rewrite it
        return f"it was written with Lightning {written[:60]!r}, and this is {own}"
    for leaf in _leaves(checkpoint):
        if isinstance(leaf, torch.Tensor) and not _is_backed(leaf):
            return f"it has a tensor of shape {list(leaf.shape)} without numbers"
    shapes = {(), *(tuple(tensor.shape) for tensor in checkpoint["state_dict"].values())}
    optimizers = checkpoint.get("optimizer_states", [])
    if not all(_is_whole(list(optimizer["state"].values()), shapes) for optimizer in optimizers):
        return "the state of its optimiser does not match the trained tensors"
    own_record = checkpoint[IDENTITY_KEY]
    if any(isinstance(leaf, torch.Tensor) for leaf in _leaves([own_record["identity"], own_record["settings"]])):
        return f"{IDENTITY_KEY} describes the run by tensors; expected plain values"
    if any(tuple(gradient.shape) not in shapes for gradient in own_record.get("gradients", {}).values()):
        return "its gradients do not match the trained tensors"
    for leaf in _leaves([checkpoint["state_dict"], optimizers, own_record.get("gradients")]):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.isnan().any():
            return "a trained tensor, or the state of its optimiser, holds NaN"
    return None


def _is_whole(states: Sequence[Any], shapes: Collection[tuple[int, ...]]) -> bool:
    """True if Adam's states all have the same keys, and shapes of trained tensors; others are not checked."""
    if not all(isinstance(state, dict) for state in states):
        return False
    if not any("exp_avg" in state for state in states):
        return True
    tensors = all(isinstance(t, torch.Tensor) and tuple(t.shape) in shapes for state in states for t in state.values())
    steps = [state.get("step") for state in states]
    return tensors and all(state.keys() == states[0].keys() for state in states) and all(step >= 0 for step in steps)


def _is_backed(tensor: torch.Tensor) -> bool:
    """True if a tensor's storage holds all its elements; an expanded tensor can be larger than any memory."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _leaves(content: Any) -> Iterator[Any]:
    """Leaves of nested containers; each container is opened once, however often it is nested."""
    remaining, opened = [content], set[int]()
    while remaining:
        item = remaining.pop()
        if not isinstance(item, dict | list | tuple):
            yield item
        elif id(item) not in opened:
            opened.add(id(item))
            remaining += item.values() if isinstance(item, dict) else item


def record_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Record of the training in a checkpoint, with `identity` and `settings`.

    Raises:
        CheckpointError: the checkpoint has no record.
    """
    record = checkpoint.get(IDENTITY_KEY)
    if not isinstance(record, dict) or not {"identity", "settings"} <= record.keys():
        raise CheckpointError("This is not a checkpoint of oa_train: it has no identity or settings.")
    return record


def check_state(checkpoint: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes of a checkpoint's tensors with those of a module's own state.

    Raises:
        CheckpointError: they differ.
    """
    names, expected = set(checkpoint["state_dict"]), set(own)
    if names != expected:
        raise CheckpointError(
            f"The checkpoint is incomplete or of another version: missing {sorted(expected - names)}, "
            f"unexpected {sorted(names - expected)}."
        )
    for name, tensor in [*checkpoint["state_dict"].items(), *checkpoint[IDENTITY_KEY].get("gradients", {}).items()]:
        if name not in own or tensor.shape != own[name].shape:
            expected_shape = list(own[name].shape) if name in own else "no such tensor"
            raise CheckpointError(
                f"The checkpoint is damaged: {name} has the shape {list(tensor.shape)}; expected {expected_shape}."
            )


def check_identity(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare the identity stored in a checkpoint with that of the module and its task.

    Raises:
        CheckpointError: they differ; every difference is listed.
    """
    differences = [line for name in expected for line in _differences(name, stored.get(name), expected[name])]
    if differences:
        raise CheckpointError(
            "The checkpoint belongs to another experiment:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nResume with the configuration it was made with (config.yaml in its run folder)."
        )


def _differences(name: str, stored: Any, expected: Any) -> list[str]:
    if isinstance(stored, Mapping) and isinstance(expected, Mapping):
        return [line for key in expected for line in _differences(f"{name}.{key}", stored.get(key), expected[key])]
    return [] if stored == expected else [f"{name}: the checkpoint has {stored}, this configuration {expected}"]


def _others(path: Path) -> str:
    folder, patterns = (path, ("*.ckpt", "checkpoints/*.ckpt")) if path.is_dir() else (path.parent, ("*.ckpt",))
    others = sorted(other for pattern in patterns for other in folder.glob(pattern) if other != path)
    names = [str(other.relative_to(folder)) for other in others]
    return f"In {folder}: {', '.join(names[:10])}." if names else ""
