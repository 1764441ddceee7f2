"""Specification of a model: its name and loading options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from oa_train.checks import check_choice
from oa_train.errors import ConfigurationError
from oa_train.models.builtin import builtin_folders

DType = Literal["float32", "bfloat16", "float16", "float64", "auto"]

Quantization = Literal["8bit", "4bit"]

BosRule = Literal["auto", "none"]


def builtin_models() -> dict[str, Path]:
    """Folders of the built-in models by name."""
    return builtin_folders("config.json")


def _from_anywhere(name: str) -> str:
    """The name of a model or adapter, made absolute if it is an existing path; a wrong path is left as typed."""
    path = Path(name).expanduser()
    is_local = any(path.glob("*config.json")) if path.is_dir() else is_gguf(name) and path.is_file()
    return str(path.absolute()) if is_local and name not in builtin_models() else name


def is_gguf(name: str) -> bool:
    """True for the name of a GGUF file."""
    return name.lower().endswith(".gguf")


@dataclass(frozen=True)
class LMSpec:
    """A frozen language model by name; given once in a configuration.

    Attributes:
        name: a built-in model (`tiny`, `facts`), a local directory in Hugging Face format, a GGUF file, or a Hub id;
            local paths are made absolute, so that they are found from another directory.
        revision: branch, tag or commit of a Hub model.
        gguf_file: path of a GGUF file, which then replaces `name`; or its name in the directory or Hub repository
            `name`. It is dequantised once, into a cache in OA_TRAIN_CACHE or the user's cache folder.
        adapter: folder or Hub id of a peft adapter (LoRA), which is merged into the weights.
        dtype: data type of the frozen weights, `auto` for the one that the model's configuration names; trained
            tensors are always float32.
        quantization: load the weights in 8 or 4 bits with bitsandbytes, for circuits of nodes.
        attn_implementation: attention back end of transformers (`sdpa`, `eager`, `flash_attention_2`, ...); by
            default the one that transformers chooses.
        bos: `auto` puts the tokenizer's BOS token (else its EOS token) in front of every prompt and never
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
        check_choice("lm.dtype", self.dtype, get_args(DType))
        check_choice("lm.bos", self.bos, get_args(BosRule))
        if self.quantization is not None:
            check_choice("lm.quantization", self.quantization, get_args(Quantization))
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
        object.__setattr__(self, "name", _from_anywhere(name))
        object.__setattr__(self, "gguf_file", gguf_file)
        object.__setattr__(self, "adapter", self.adapter and _from_anywhere(self.adapter))


# The default of arguments is this and not None: the command line can pass the fields of `lm` on to a default that is a
# specification, but not to None.
BUILT_IN = LMSpec()
