"""Loading frozen Hugging Face models by name.

The model stays the plain `PreTrainedModel` that transformers made: `models.families` says what its parts are called,
and `models.taps` replaces parts of a run.
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook
from transformers.utils.peft_utils import find_adapter_config_file

from oa_train.errors import ConfigurationError, ModelError, OaTrainError, nearest_names
from oa_train.models.adapters import merged
from oa_train.models.builtin import builtin_folders
from oa_train.models.families import check_config, check_family, fold_residual_scale
from oa_train.models.gguf import dequantised
from oa_train.models.hub import hub_answers

# The class of every model here, by a name that other modules can import without importing transformers.
CausalLM = PreTrainedModel

DType = Literal["float32", "bfloat16", "float16", "float64", "auto"]
Quantization = Literal["8bit", "4bit"]
BosRule = Literal["auto", "none"]

# Values of each parameter that enter the fingerprint: enough to tell two trainings of one architecture
# apart, few enough that a model of tens of gigabytes is fingerprinted in a second.
FINGERPRINT_VALUES = 1024

# Buffers that older versions of transformers saved with the weights, and that models now compute themselves.
_COMPUTED_BUFFERS = re.compile(
    r"\.(inv_freq|(attn|attention)\.bias|masked_bias|embed_positions|position_ids|(cos|sin)_cached|version)$"
)
_CHECKED_DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
_LFS_POINTER = b"version https://git-lfs"
_ADAPTER = (
    "{} holds a LoRA or other adapter of peft, which is no model by itself and would be ignored beside full weights.\n"
    "Give the model that it was trained on as lm.name and the adapter as lm.adapter; it is merged on loading."
)

_EXPECTED = (
    "a directory that `save_pretrained` of transformers wrote, with config.json, weights and tokenizer files, or a "
    "GGUF file"
)

# Where a model of several kinds of input keeps its language model, and where that model has them by itself.
_TEXT_PART = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}


def builtin_models() -> dict[str, Path]:
    """Folders of the built-in models by name."""
    return builtin_folders("config.json")


def from_anywhere(name: str) -> str:
    """The name of a model or an adapter, made absolute where it is the path of one; a wrong path stays as typed."""
    path = Path(name).expanduser()
    is_local = any(path.glob("*config.json")) if path.is_dir() else _is_gguf(name) and path.is_file()
    return str(path.absolute()) if is_local and name not in builtin_models() else name


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


@dataclass(frozen=True)
class LMSpec:
    """Frozen language model by name; given once in a configuration.

    Attributes:
        name: a built-in model (`tiny`), a local directory in Hugging Face format, a GGUF file, or a Hub id; local
            paths are made absolute, so that they are found from another directory.
        revision: branch, tag or commit of a Hub model.
        gguf_file: path of a GGUF file, which then is the name; or its name in the directory or Hub repository `name`.
            It is dequantised once, into a cache in OA_TRAIN_CACHE or the user's cache folder.
        adapter: folder or Hub id of a peft adapter (LoRA), which is merged into the weights.
        dtype: data type of the frozen weights, `auto` for the one that the model's configuration names; trained
            tensors are float32 whatever it is.
        quantization: load the weights in 8 or 4 bits with bitsandbytes, for circuits of nodes.
        attn_implementation: attention back end of transformers (`sdpa`, `eager`, `flash_attention_2`, ...);
            chosen by transformers by default.
        bos: `auto` puts the tokenizer's bos token (else its eos token) in front of every prompt and never
            ablates that position; `none` adds nothing and protects nothing.
        local_files_only: never contact the Hub; the environment variable HF_HUB_OFFLINE=1 does the same.
        trust_remote_code: let transformers run model code that comes with the weights.
    """

    name: str = "tiny"
    revision: str | None = None
    gguf_file: str | None = None
    adapter: str | None = None
    dtype: DType = "float32"
    quantization: Quantization | None = None
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
        if self.quantization not in (None, *get_args(Quantization)):
            raise ConfigurationError(f"lm.quantization is {self.quantization!r}; expected 8bit, 4bit or nothing.")
        if self.quantization and self.adapter:
            raise ConfigurationError(
                "lm.adapter is merged into the weights, which lm.quantization would store as codes; give one of the "
                "two, or a folder with the merged model as lm.name."
            )
        name, gguf_file = self.name, self.gguf_file
        if gguf_file and (name in builtin_models() or name == gguf_file):
            name, gguf_file = gguf_file, None
        elif gguf_file and Path(name).expanduser().is_dir():
            name, gguf_file = str(Path(name, gguf_file)), None
        object.__setattr__(self, "name", from_anywhere(name))
        object.__setattr__(self, "gguf_file", gguf_file)
        object.__setattr__(self, "adapter", self.adapter and from_anywhere(self.adapter))


# The default of arguments is this and not None: the command line can hand the fields of `lm` on to a default that is
# a specification, but not to None.
BUILT_IN = LMSpec()


def locate(spec: LMSpec) -> dict[str, Any]:
    """Arguments by which every `from_pretrained` of transformers finds what `spec` names; dequantises a GGUF file.

    Raises:
        ModelError: the name is a directory without a model or with an adapter, or a file that is no GGUF.
    """
    shared = {"local_files_only": spec.local_files_only, "trust_remote_code": spec.trust_remote_code}
    folder = builtin_models().get(spec.name, Path(spec.name).expanduser())
    looks_like_path = spec.name.startswith((".", "~", os.sep)) or spec.name.count("/") > 1
    if not (folder.exists() or looks_like_path or _is_gguf(spec.name)):
        shared["local_files_only"] = spec.local_files_only or not hub_answers()
        where = {"revision": spec.revision or "main", **shared}
        if spec.gguf_file is None:
            return {"pretrained_model_name_or_path": spec.name, **where}
        with loading(f"file {spec.gguf_file} of", spec):
            file = Path(str(cached_file(spec.name, spec.gguf_file, revision=where["revision"], **shared)))
        return {"pretrained_model_name_or_path": str(dequantised(file)), **shared}
    if folder.is_file() and _is_gguf(spec.name):
        return {"pretrained_model_name_or_path": str(dequantised(folder)), **shared}
    if next(folder.glob("adapter_*"), None):
        raise ModelError(_ADAPTER.format(f"The directory {spec.name!r}"))
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


def load_config(spec: LMSpec) -> PretrainedConfig:
    """Read the model's configuration without its weights.

    Raises:
        ModelError: there is no such model, it cannot be reached, it is an adapter, or its family is not in the table.
    """
    return _read_config(spec)[0]


def _read_config(spec: LMSpec) -> tuple[PretrainedConfig, bool]:
    """The configuration of the language model, and whether the checkpoint has other parts (a vision tower) as well."""
    where = locate(spec)
    with loading("model", spec):
        if "revision" in where and find_adapter_config_file(
            spec.name, revision=where["revision"], local_files_only=where["local_files_only"]
        ):
            raise ModelError(_ADAPTER.format(f"The Hub's {spec.name!r}"))
        whole: PretrainedConfig = AutoConfig.from_pretrained(**where)
        config = whole.get_text_config(decoder=True)
    if config is whole:
        check_config(config)
        return config, False
    try:
        check_config(config)
    except ModelError as problem:
        raise ModelError(f"The language model of {whole.model_type!r} is not supported: {problem}") from problem
    config.dtype = config.dtype or whole.dtype
    config.tie_word_embeddings = getattr(whole, "tie_word_embeddings", config.tie_word_embeddings)
    config.name_or_path = whole.name_or_path
    return config, True


def load_model(spec: LMSpec) -> CausalLM:
    """Load a model in evaluation mode with frozen weights, as transformers made it, on the CPU.

    Raises:
        ModelError: there is no such model, it cannot be reached, its family is not in the table, or its weights are
            damaged, not finite, or not those that its configuration asks for.
    """
    (config, is_part), where = _read_config(spec), locate(spec)
    options = _quantization(spec, config)
    if is_part:
        options["key_mapping"] = _TEXT_PART
    with loading("model", spec):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where,
            config=config,
            dtype=_dtype(spec, config),
            attn_implementation=spec.attn_implementation,
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    unused = sorted(name for name in report["unexpected_keys"] if not _COMPUTED_BUFFERS.search(f".{name}"))
    if is_part:
        unused = [name for name in unused if name.startswith(check_config(config).blocks)]
    if missing:
        raise ModelError(
            f"The weights of {spec.name!r} lack {_listed(missing)} that its configuration asks for; transformers "
            "would fill them with random numbers."
        )
    if unused:
        raise ModelError(
            f"The weights of {spec.name!r} hold {_listed(unused)} that a causal language model of its configuration "
            "does not have: config.json names too few layers, say, or the model has another head.\nCorrect "
            f"config.json. To do without them, save the rest with AutoModelForCausalLM.from_pretrained({spec.name!r})"
            ".save_pretrained(FOLDER), the tokenizer too, and give FOLDER as lm.name."
        )
    check_finite(model)
    if spec.adapter is not None:
        model = merged(model, spec.adapter, spec.local_files_only, base=spec.name)
    return freeze(model)


def _quantization(spec: LMSpec, config: PretrainedConfig) -> dict[str, Any]:
    if spec.quantization is None:
        return {}
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(f"lm.quantization needs {' and '.join(missing)}: pip install 'oa_train[quantization]'")
    if spec.quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_dtype(spec, config)
    )
    return {"quantization_config": four}


def _dtype(spec: LMSpec, config: PretrainedConfig) -> torch.dtype:
    dtype: Any = getattr(torch, spec.dtype) if spec.dtype != "auto" else config.dtype or torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


def with_dtype(spec: LMSpec) -> LMSpec:
    """The specification with the data type of the model's configuration in place of `auto`.

    Raises:
        ModelError: as `load_config`, which is called for `auto` only.
    """
    if spec.dtype != "auto":
        return spec
    return replace(spec, dtype=str(_dtype(spec, load_config(spec))).removeprefix("torch."))  # type: ignore[arg-type]


def empty_model(spec: LMSpec) -> CausalLM:
    """Build a model without its weights, on torch's meta device, in evaluation mode and frozen.

    Only the configuration is read. Of the attention back ends only `eager` makes a difference: the others need not be
    installed.

    Raises:
        ModelError: there is no such configuration, it cannot be reached, or its family is not in the table.
    """
    config = load_config(spec)
    with loading("model", spec), torch.device("meta"):
        model: CausalLM = AutoModelForCausalLM.from_config(
            config,
            dtype=_dtype(spec, config),
            attn_implementation="eager" if spec.attn_implementation == "eager" else None,
            trust_remote_code=spec.trust_remote_code,
        )
    return freeze(model)


def model_of_config(family: str, **settings: Any) -> CausalLM:
    """Make a model with random weights in float32, without changing the global random state.

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
    """Put a model into evaluation mode, turn off the gradients of its weights, and fold its `residual_scale`."""
    model.eval().requires_grad_(False)
    fold_residual_scale(model)
    if model.dtype is not torch.bfloat16:
        model.set_experts_implementation("eager")  # products of all experts at once are made for bfloat16
    return model


@torch.no_grad()
def check_finite(model: CausalLM) -> None:
    """Check that no weight is NaN or infinite; sharded weights and those on the meta device are skipped.

    Raises:
        ModelError: some are; the message names their parameters.
    """
    wrong = []
    for name, parameter in model.named_parameters():
        if type(parameter.data) is torch.Tensor and not parameter.is_meta and parameter.dtype in _CHECKED_DTYPES:
            # One pass without a copy; NaN comes out of it as well.
            extremes = torch.stack(parameter.aminmax()) if parameter.numel() else parameter
            if not extremes.isfinite().all():
                wrong.append(name)
    if wrong:
        raise ModelError(
            f"The model's weights hold NaN or infinity, in {_listed(wrong)}: its training has diverged, the file is "
            f"damaged, or numbers are too large for {str(model.dtype).removeprefix('torch.')}. Choose another "
            "checkpoint of the model, or another lm.dtype."
        )


def fingerprint(model: CausalLM) -> str:
    """Sixteen hexadecimal digits that identify a model by its weights.

    Names, shapes and evenly spaced values of all parameters are hashed. Values are rounded to bfloat16 first, so
    that the same weights loaded as float32 and as bfloat16 agree.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // FINGERPRINT_VALUES)
        values = flat[::stride][:FINGERPRINT_VALUES].to("cpu", torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def loading(kind: str, spec: LMSpec) -> Iterator[None]:
    """Turn any error that transformers raises into a ModelError; `kind` is "model" or "tokenizer of".

    Damaged files and wrong values in them break its code anywhere, with errors of any class. Bars of the loading are
    not shown, those of downloads are.
    """
    hook = set_tqdm_hook(lambda factory, arguments, options: EmptyTqdm(*arguments, **options))
    try:
        yield
    except (OaTrainError, MemoryError):
        raise
    except Exception as problem:
        builtin = builtin_models()
        near = nearest_names(spec.name, builtin) if spec.name not in builtin else ""
        raise ModelError(
            f"The {kind} {spec.name!r} cannot be loaded: {_reason(problem)}\n"
            f"{_damage(builtin.get(spec.name, Path(spec.name).expanduser()))}"
            f"Expected a built-in name ({', '.join(sorted(builtin)) or 'none found'}), a local directory with "
            "configuration, weights and tokenizer files, all whole, or the id of a model on the Hub that this machine "
            f"can reach. {near if near.startswith('Did you mean') else ''}".rstrip()
        ) from problem
    finally:
        set_tqdm_hook(hook)


def _reason(problem: Exception) -> str:
    """The first sentence of an error, with its class where that says more than the words."""
    first, _, rest = str(problem).strip().partition("\n")
    if first.endswith(":"):  # the second line of a wrong value in config.json says what is wrong with it
        first = f"{first} {rest.partition(chr(10))[0].strip()}"
    first = re.split(r"(?<=\w\w\.) ", first)[0]
    bare = isinstance(problem, LookupError | AttributeError | TypeError | ArithmeticError)
    return first if first and not bare else f"{type(problem).__name__}: {first}"


def _damage(folder: Path) -> str:
    """A line about each file of a folder that is plainly not what its name says."""
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


def _listed(names: list[str]) -> str:
    plural, more = "s" * (len(names) > 1), ", ..." * (len(names) > 3)
    return f"{len(names)} tensor{plural} ({', '.join(names[:3])}{more})"
