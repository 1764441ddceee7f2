"""GGUF files, dequantised once into a cache of folders that load like any other model."""

import hashlib
import os
import shutil
import sys
from contextlib import redirect_stderr
from functools import lru_cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from oa_train.errors import ModelError, OaTrainError
from oa_train.files import sync_folder
from oa_train.models.families import check_config

_MAGIC = b"GGUF"


def cache_folder() -> Path:
    """Folder of cached files: OA_TRAIN_CACHE, else `oa_train` in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("OA_TRAIN_CACHE") or user / "oa_train").expanduser().absolute()


def dequantised(file: Path) -> Path:
    """Folder with the model of a GGUF file, with float32 weights (4 bytes each), and its tokenizer.

    It is made at the first call and later found by the checksum of the file. A folder that was not finished is never
    used; if two processes need the same one, one makes it and the other waits.

    Raises:
        ModelError: the file is truncated or not a GGUF file, its family is not in the table, a library is missing, or
            the cache cannot be written.
    """
    state = file.stat()
    folder = cache_folder() / "gguf" / _checksum(file, state.st_size, state.st_mtime_ns)
    if folder.is_dir():
        return folder
    _check(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _fill(folder, file)
    except OSError as problem:
        raise ModelError(
            f"The weights of {str(file)!r} cannot be dequantised into {folder.parent}: {problem}\nThey need 4 bytes "
            "each there; the environment variable OA_TRAIN_CACHE names another folder for the cache."
        ) from problem
    return folder


@lru_cache
def _checksum(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; its size and modification time are the key of the cache."""
    del size, modified
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(file: Path) -> None:
    with file.open("rb") as stream:
        magic = stream.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ModelError(f"{str(file)!r} is not a GGUF file: it begins with {magic!r} and not with {_MAGIC!r}.")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"A GGUF file needs {' and '.join(missing)} to be dequantised, once: pip install 'oa_train[gguf]'"
        )


def _fill(folder: Path, file: Path) -> None:
    """Dequantise into a temporary folder, which is renamed when it is complete."""
    sys.stderr.write(
        f"dequantising {file.name} ({file.stat().st_size / 1e6:,.0f} MB) into {folder.parent}; this happens once\n"
    )
    sys.stderr.flush()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        model, tokenizer = _read(file)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for written in partial.iterdir():
            with written.open("rb") as stream:
                os.fsync(stream)
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(file: Path) -> tuple[Any, Any]:
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
    }
    try:
        config = AutoConfig.from_pretrained(**where)
        check_config(config)
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        with redirect_stderr(StringIO()):  # a progress bar of transformers that cannot be turned off
            loaded: Any = AutoModelForCausalLM.from_pretrained(**where, **options)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, report = loaded
        if report["missing_keys"]:
            raise ValueError(f"it lacks {', '.join(sorted(report['missing_keys'])[:3])}")
    except (OaTrainError, MemoryError):
        raise
    except Exception as problem:  # damaged files make the reader fail anywhere
        first = str(problem).partition("\n")[0]
        raise ModelError(
            f"The GGUF file {str(file)!r} cannot be read: {type(problem).__name__}: {first}\nIt has "
            f"{file.stat().st_size:,} bytes; it may be truncated or damaged (download it again), or of an "
            "architecture that transformers does not read from GGUF (take the model's safetensors instead)."
        ) from problem
    # Otherwise transformers refuses to save a model that was read from quantised weights.
    del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer
