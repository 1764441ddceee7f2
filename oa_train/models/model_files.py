"""Paths of a model's files, and the errors if they cannot be loaded."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

from oa_train.errors import ModelError, OaTrainError, suggestion
from oa_train.models.gguf import dequantised
from oa_train.models.hub import hub_answers
from oa_train.models.spec import LMSpec, builtin_models, is_gguf

_LFS_POINTER = b"version https://git-lfs"

ADAPTER_ALONE = (
    "{} holds a LoRA or other peft adapter, which is not a model and would be ignored next to full weights.\n"
    "Give the model on which it was trained as lm.name and the adapter as lm.adapter; it is merged on loading."
)

_EXPECTED = (
    "a directory that `save_pretrained` of transformers wrote, with config.json, weights and tokenizer files, or a "
    "GGUF file"
)


def locate(spec: LMSpec) -> dict[str, Any]:
    """Arguments with which every `from_pretrained` of transformers finds the model of `spec`; dequantises GGUF files.

    Raises:
        ModelError: the name is a directory without a model or with an adapter, or a file that is not a GGUF file.
    """
    shared = {"local_files_only": spec.local_files_only, "trust_remote_code": spec.trust_remote_code}
    folder = builtin_models().get(spec.name, Path(spec.name).expanduser())
    looks_like_path = spec.name.startswith((".", "~", os.sep)) or spec.name.count("/") > 1
    if not (folder.exists() or looks_like_path or is_gguf(spec.name)):
        shared["local_files_only"] = spec.local_files_only or not hub_answers()
        where = {"revision": spec.revision or "main", **shared}
        if spec.gguf_file is None:
            return {"pretrained_model_name_or_path": spec.name, **where}
        with loading(f"file {spec.gguf_file} of", spec):
            file = Path(str(cached_file(spec.name, spec.gguf_file, revision=where["revision"], **shared)))
        return {"pretrained_model_name_or_path": str(dequantised(file)), **shared}
    if folder.is_file() and is_gguf(spec.name):
        return {"pretrained_model_name_or_path": str(dequantised(folder)), **shared}
    if next(folder.glob("adapter_*"), None):
        raise ModelError(ADAPTER_ALONE.format(f"The directory {spec.name!r}"))
    if folder.is_file():
        raise ModelError(
            f"lm.name is {spec.name!r}, a file.\nExpected the directory that holds it, with config.json, weights and "
            "tokenizer files, or a GGUF file (its name ends in .gguf)."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(_no_model(spec.name, folder))
    return {"pretrained_model_name_or_path": str(folder), **shared}


def _no_model(name: str, folder: Path) -> str:
    if not folder.exists():
        return f"lm.name is {name!r}, which does not exist.\nExpected {_EXPECTED}."
    inside = sorted(file.name for file in folder.glob("*.gguf"))
    advice = f"Expected {_EXPECTED}."
    if inside:
        advice = f"It holds GGUF files; choose one: --lm.gguf_file {shlex.quote(str(folder / inside[0]))}"
    return f"lm.name is {name!r}, a directory that has no config.json.\n{advice}"


@contextmanager
def loading(kind: str, spec: LMSpec) -> Iterator[None]:
    """Turn any error that transformers raises into a ModelError; `kind` is "model" or "tokenizer of".

    Damaged files and wrong values in them make its code fail anywhere, with errors of any class. Progress bars of
    loading are hidden, those of downloads are shown.
    """
    hook = set_tqdm_hook(lambda factory, arguments, options: EmptyTqdm(*arguments, **options))
    try:
        yield
    except (OaTrainError, MemoryError):
        raise
    except Exception as problem:
        builtin = builtin_models()
        near = suggestion(spec.name, builtin) if spec.name not in builtin else ""
        raise ModelError(
            f"The {kind} {spec.name!r} cannot be loaded: {_reason(problem)}\n"
            f"{_damage(builtin.get(spec.name, Path(spec.name).expanduser()))}"
            f"Expected a built-in name ({', '.join(sorted(builtin)) or 'none found'}), a local directory with "
            "configuration, weights and tokenizer files, all whole, or the id of a model on the Hub that this machine "
            f"can reach. {near}".rstrip()
        ) from problem
    finally:
        set_tqdm_hook(hook)


def _reason(problem: Exception) -> str:
    """The first sentence of an error, with its class if that says more than the words."""
    first, _, rest = str(problem).strip().partition("\n")
    if first.endswith(":"):  # for a wrong value in config.json, the second line says what is wrong with it
        first = f"{first} {rest.partition(chr(10))[0].strip()}"
    first = re.split(r"(?<=\w\w\.) ", first)[0]
    bare = isinstance(problem, LookupError | AttributeError | TypeError | ArithmeticError)
    return first if first and not bare else f"{type(problem).__name__}: {first}"


def _damage(folder: Path) -> str:
    """A line about each file of a folder whose content is plainly not what its name says."""
    lines = ""
    for file in sorted(filter(Path.is_file, folder.glob("*.*"))):
        with file.open("rb") as stream:
            pointer = stream.read(len(_LFS_POINTER)) == _LFS_POINTER
        if pointer:
            lines += f"{file.name} is a pointer of Git LFS instead of the file; run `git lfs pull` in its folder.\n"
        elif file.suffix == ".json":
            try:
                content = json.loads(file.read_bytes())
                if file.name.endswith(".index.json"):
                    content["weight_map"].values()
            except (ValueError, LookupError, TypeError, AttributeError) as problem:
                lines += f"{file.name} is damaged: {_reason(problem)}.\n"
    return lines
