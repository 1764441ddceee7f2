"""From a name to a frozen Hugging Face model.

The model stays the plain `PreTrainedModel` that transformers made. What its parts are called stands in
`models.families`; functions that replace parts of a run stand in `models.taps`.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from oa_train.errors import ConfigurationError, ModelError, nearest_names
from oa_train.models.builtin import builtin_folders
from oa_train.models.families import check_config, check_family
from oa_train.models.hub import hub_answers

# What every function that runs a model takes: the plain class of transformers, under a name that other modules can
# import without importing transformers themselves.
CausalLM = PreTrainedModel

DType = Literal["float32", "bfloat16", "float16", "float64"]
BosRule = Literal["auto", "none"]

# Values of each parameter that enter the fingerprint: enough to tell two trainings of one architecture
# apart, few enough that a model of tens of gigabytes is fingerprinted in a second.
FINGERPRINT_VALUES = 1024


@dataclass(frozen=True)
class LMSpec:
    """Which frozen language model to use; named once in a configuration.

    Attributes:
        name: a built-in model (`tiny`), a local directory in Hugging Face format, or a Hub id.
        revision: branch, tag or commit of a Hub model.
        dtype: data type of the frozen weights; what is trained is float32 whatever stands here.
        attn_implementation: attention back end of transformers (`sdpa`, `eager`, `flash_attention_2`, ...);
            its own choice when empty.
        bos: `auto` puts the tokenizer's bos token (else its eos token) in front of every prompt and never
            ablates that position; `none` adds nothing and protects nothing.
        local_files_only: never reach for the Hub; the environment variable HF_HUB_OFFLINE=1 does the same.
        trust_remote_code: let transformers run model code that comes with the weights.
    """

    name: str = "tiny"
    revision: str | None = None
    dtype: DType = "float32"
    attn_implementation: str | None = None
    bos: BosRule = "auto"
    local_files_only: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigurationError("lm.name is empty; expected a built-in name, a local directory or a Hub id.")
        if self.dtype not in get_args(DType):
            raise ConfigurationError(f"lm.dtype is {self.dtype!r}. {nearest_names(self.dtype, get_args(DType))}")
        if self.bos not in get_args(BosRule):
            raise ConfigurationError(f"lm.bos is {self.bos!r}; expected auto or none.")


# The model that everything uses when none is named. Arguments default to it and not to None, because the command line
# can hand the fields of `lm` on to a default that is a specification, but not to one that is nothing.
BUILT_IN = LMSpec()


def builtin_models() -> dict[str, Path]:
    """Folders of the built-in models by name."""
    return builtin_folders("config.json")


def locate(spec: LMSpec) -> dict[str, Any]:
    """Arguments by which every `from_pretrained` of transformers finds what `spec` names.

    Raises:
        ModelError: the name is a directory without a model.
    """
    shared = {"local_files_only": spec.local_files_only, "trust_remote_code": spec.trust_remote_code}
    builtin = builtin_models().get(spec.name)
    if builtin is not None:
        return {"pretrained_model_name_or_path": str(builtin), **shared}
    folder = Path(spec.name).expanduser()
    looks_like_path = spec.name.startswith((".", "~", os.sep)) or spec.name.count("/") > 1
    if folder.is_dir() or looks_like_path:
        if not (folder / "config.json").is_file():
            state = "has no config.json" if folder.is_dir() else "does not exist"
            raise ModelError(
                f"lm.name is {spec.name!r}, a directory that {state}.\nExpected a directory that "
                "`save_pretrained` of transformers wrote, with config.json, weights and tokenizer files."
            )
        return {"pretrained_model_name_or_path": str(folder), **shared}
    shared["local_files_only"] = spec.local_files_only or not hub_answers()
    return {"pretrained_model_name_or_path": spec.name, "revision": spec.revision or "main", **shared}


def load_config(spec: LMSpec) -> PretrainedConfig:
    """Read the model's configuration without its weights.

    Raises:
        ModelError: there is no such model, it cannot be reached, or its family is not in the table.
    """
    where = locate(spec)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(**where)
    except (OSError, ValueError, KeyError) as problem:
        raise _not_loaded(spec, problem) from problem
    check_config(config)
    return config


def load_model(spec: LMSpec) -> CausalLM:
    """Load a model in evaluation mode with frozen weights.

    Args:
        spec: which model.

    Returns:
        The model as transformers made it, on the CPU.

    Raises:
        ModelError: there is no such model, it cannot be reached, its weights are damaged or incomplete, or its
            family is not in the table.
    """
    config, where = load_config(spec), locate(spec)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where,
            config=config,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attn_implementation,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as problem:
        raise _not_loaded(spec, problem) from problem
    except Exception as problem:  # safetensors raises its own class, which is a bare Exception
        if type(problem).__module__.startswith("safetensors"):
            raise _not_loaded(spec, problem) from problem
        raise
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"The weights of {spec.name!r} lack {len(missing)} tensors that its configuration asks for "
            f"({', '.join(missing[:3])}, ...); transformers would fill them with random numbers."
        )
    return freeze(model)


def empty_model(spec: LMSpec) -> CausalLM:
    """Build a model without its weights, on torch's meta device, where tensors have shapes and no content.

    Args:
        spec: which model; only its configuration is read. Of the attention back ends only `eager` makes a
            difference: the others need not be installed.

    Returns:
        The model in evaluation mode, frozen.

    Raises:
        ModelError: there is no such configuration, it cannot be reached, or its family is not in the table.
    """
    config = load_config(spec)
    try:
        with torch.device("meta"):
            model: CausalLM = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, spec.dtype),
                attn_implementation="eager" if spec.attn_implementation == "eager" else None,
                trust_remote_code=spec.trust_remote_code,
            )
    except (OSError, ValueError, KeyError, ImportError) as problem:
        raise _not_loaded(spec, problem) from problem
    return freeze(model)


def model_of_config(family: str, **settings: Any) -> CausalLM:
    """Make a model with random weights in float32; the global generator is left as it was.

    Args:
        family: `model_type` of the family.
        **settings: of its configuration.

    Raises:
        ModelError: the family is not in the table.
    """
    check_family(family)
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        model: CausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return freeze(model)


def freeze(model: CausalLM) -> CausalLM:
    """Put a model into evaluation mode and take its weights out of every gradient."""
    model.eval().requires_grad_(False)
    return model


def fingerprint(model: CausalLM) -> str:
    """Identify a model by its weights.

    Names, shapes and evenly spaced values of all parameters are hashed. Values are rounded to bfloat16 first, so
    that the same weights loaded as float32 and as bfloat16 agree.

    Returns:
        Sixteen hexadecimal digits.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // FINGERPRINT_VALUES)
        values = flat[::stride][:FINGERPRINT_VALUES].to("cpu", torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _not_loaded(spec: LMSpec, problem: Exception) -> ModelError:
    builtin = builtin_models()
    first = str(problem).strip().split("\n")[0]
    return ModelError(
        f"The model {spec.name!r} cannot be loaded: {first}\n"
        f"Expected a built-in name ({', '.join(sorted(builtin)) or 'none found'}), a local directory, or the id "
        f"of a model on the Hub that this machine can reach. {_suggestion(spec.name, builtin)}".rstrip()
    )


def _suggestion(name: str, builtin: dict[str, Path]) -> str:
    sentence = nearest_names(name, builtin) if builtin and name not in builtin else ""
    return sentence if sentence.startswith("Did you mean") else ""
