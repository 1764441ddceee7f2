"""Loading frozen Hugging Face models by name.

The model remains the plain `PreTrainedModel` that transformers made: `models.parts` finds its parts, and
`models.hooks` reads and replaces their tensors during a run.
"""

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from oa_train.errors import ConfigurationError, ModelError
from oa_train.models.families import check_config, check_family
from oa_train.models.frozen import CausalLM, freeze
from oa_train.models.model_files import ADAPTER_ALONE, loading, locate
from oa_train.models.peft_adapters import merged
from oa_train.models.spec import LMSpec
from oa_train.models.weights import check_complete, check_finite

# Prefixes of the language model's weights inside a multimodal model, and their prefixes in the language model alone.
_TEXT_PART = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}


def load_config(spec: LMSpec) -> PretrainedConfig:
    """Read the model's configuration without its weights.

    Raises:
        ModelError: the model does not exist, cannot be reached or is an adapter, or its family is not in the table.
    """
    return _read_config(spec)[0]


def _read_config(spec: LMSpec) -> tuple[PretrainedConfig, bool]:
    """The configuration of the language model, and whether the checkpoint has other parts (a vision tower) as well."""
    where = locate(spec)
    with loading("model", spec):
        if "revision" in where and find_adapter_config_file(
            spec.name, revision=where["revision"], local_files_only=where["local_files_only"]
        ):
            raise ModelError(ADAPTER_ALONE.format(f"The Hub's {spec.name!r}"))
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
        ModelError: the model does not exist or cannot be reached, its family is not in the table, or its weights are
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
    check_complete(report, spec.name, check_config(config).blocks if is_part else "")
    check_finite(model)
    if spec.adapter is not None:
        model = merged(model, spec.adapter, spec.local_files_only, base=spec.name)
    return freeze(model)


def load_on_device(spec: LMSpec, device: str = "auto") -> CausalLM:
    """Load a model (see `load_model`) on a device.

    Args:
        spec: the model.
        device: name of the device in torch; `auto` is the GPU of this process, or the CPU if there is none.

    Raises:
        ConfigurationError: the device cannot be used.
        ModelError: as in `load_model`.
    """
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK'] if dist.is_torchelastic_launched() else 0}"
    device = "cpu" if device == "auto" else device
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as problem:
        first = str(problem).split("\n")[0]
        raise ConfigurationError(f"--device {device!r} cannot be used: {first}") from problem
    model = load_model(spec)
    torch.nn.Module.to(model, device)
    return model


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
    """The specification, with the data type `auto` replaced by that of the model's configuration.

    Raises:
        ModelError: as in `load_config`, which is called for `auto` only.
    """
    if spec.dtype != "auto":
        return spec
    return replace(spec, dtype=str(_dtype(spec, load_config(spec))).removeprefix("torch."))  # type: ignore[arg-type]


def empty_model(spec: LMSpec) -> CausalLM:
    """Build a model without its weights, on torch's meta device, in evaluation mode and frozen.

    Only the configuration is read. The only attention back end that makes a difference is `eager`; the others need not
    be installed.

    Raises:
        ModelError: the configuration does not exist or cannot be reached, or its family is not in the table.
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

    Raises:
        ModelError: the family is not in the table.
    """
    check_family(family)
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        model: CausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return freeze(model)
