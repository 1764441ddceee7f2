"""peft adapters (LoRA and its relatives), merged into the weights of the model on which they were trained."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel

from oa_train.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def merged(model: PreTrainedModel, name: str, local_files_only: bool, base: str) -> PreTrainedModel:
    """The model with an adapter merged into its weights.

    Args:
        model: the model on which the adapter was trained; it is changed in place.
        name: folder or Hub id of the adapter. Only safetensors are read.
        local_files_only: never contact the Hub.
        base: name of the model. A warning is given if the adapter names another one.

    Raises:
        ModelError: the adapter does not exist, does not fit the model or cannot be merged, or peft is missing.
    """
    if find_spec("peft") is None:
        raise ModelError("lm.adapter needs peft: pip install 'oa_train[peft]'")
    from peft import PeftModel, get_peft_model_state_dict

    folder, trained_on = _folder(name, local_files_only), ""
    try:
        trained_on = json.loads((folder / CONFIG).read_text()).get("base_model_name_or_path") or ""
        with safe_open(folder / WEIGHTS, "pt") as file:
            stored = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about things that are checked below
            adapted: Any = PeftModel.from_pretrained(model, str(folder))
        different = sorted(stored ^ set(get_peft_model_state_dict(adapted)))
        if different:
            raise ValueError(f"{len(different)} tensors that it has and should have differ, as {different[0]}")
        if not hasattr(adapted, "merge_and_unload"):
            raise ValueError("adapters of its kind are not a change of weights")
        result: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except MemoryError:
        raise
    except Exception as problem:  # damaged files and wrong models make peft fail anywhere
        raise ModelError(
            f"The adapter {name!r} cannot be merged into {base!r}: {type(problem).__name__}: "
            f"{str(problem).partition(chr(10))[0]}\nIt was trained on {trained_on or 'a model it does not name'}; "
            "give that as lm.name."
        ) from problem
    if trained_on and Path(trained_on).name != Path(base).name:
        warnings.warn(
            f"The adapter {name!r} was trained on {trained_on!r} and is merged into {base!r}, whose layers have the "
            "same shapes.",
            stacklevel=2,
        )
    return result


def _folder(name: str, local_files_only: bool) -> Path:
    folder = Path(name).expanduser()
    if not folder.exists():
        try:
            files = [CONFIG, WEIGHTS]
            folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=local_files_only))
        except Exception as problem:
            raise ModelError(
                f"The adapter {name!r} cannot be loaded: {str(problem).partition(chr(10))[0]}\nExpected a local "
                "folder or the id of an adapter on the Hub."
            ) from problem
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing:
        raise ModelError(
            f"The adapter {name!r} has no {' and no '.join(missing)}.\nExpected the folder that `save_pretrained` of "
            "a peft model wrote; weights in other formats than safetensors are not read, because they can hold code."
        )
    return folder
