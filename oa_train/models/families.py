"""The table of model families, and the parts of a model that it leads to.

A family is data: where Hugging Face's classes keep their decoder blocks, attention output projections and MLPs.
Nothing of a family's arithmetic is repeated here. To support another family, add one entry to `FAMILIES`.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from oa_train.errors import ModelError, nearest_names

WITHOUT_DEVICE_MAP = (
    "Masks and constants are on one device and are mixed into every layer, so all layers have to be there too. Load "
    "the model onto one device, in bfloat16 if it is large (lm.dtype); --trainer.strategy fsdp shards one that is "
    "larger still."
)


@dataclass(frozen=True)
class Family:
    """Paths to the parts of a Hugging Face causal language model, from a block unless stated otherwise.

    Attributes:
        model_type: `config.model_type` of the family.
        blocks: path from the causal language model to its list of decoder blocks.
        attention_output: path to the projection that adds all heads to the residual stream; its input is the
            concatenation of the heads' values.
        mlp: path to the module whose output the block adds to the residual stream.
        final_norm: path from the causal language model to the norm before the unembedding.
        attention_norm: path to the norm through which attention reads the residual stream; empty without one.
        projections: paths to the query, key and value projections, or to a fused one: all queries first, then all
            keys, then all values.
        mlp_input: path to the module through which the MLP reads the residual stream, its norm.
        down_projection: path to the projection that the MLP's neurons enter; empty where there is no single one, as
            in mixtures of experts.
        mlp_body: path to the module with the MLP's hidden layer, which `recompute` runs again; empty where the block
            itself has it.
        interleaved: whether a fused projection interleaves each head's query, key and value.
        parallel: whether attention and MLP of a block read the same residual stream, so that the MLP does not read
            the heads of its own layer.
        post_norms: whether the outputs of attention and MLP are normed before they are added to the residual stream.
        attention_post_norm: path to that norm of attention.
        joint_norms: whether the queries of all heads, and their keys, are normed together, so that what one head reads
            changes the others' queries.
        attention_sinks: whether attention weights add up to less than 1, so that heads are no averages of values.
        residual_scale: attribute of configuration and block with a factor for all that attention and MLP add; `freeze`
            folds it into the weights of their last projections.
        variants: what is different in models whose configuration has an attribute set, by that attribute.
        refuses: why models of the family do not fit whose configuration has an attribute set, or with `not ` before
            its name has it not set, by that attribute.
    """

    model_type: str
    blocks: str
    attention_output: str
    mlp: str
    final_norm: str
    attention_norm: str
    projections: tuple[str, ...]
    mlp_input: str
    down_projection: str
    mlp_body: str = "mlp"
    interleaved: bool = False
    parallel: bool = False
    post_norms: bool = False
    attention_post_norm: str = ""
    joint_norms: bool = False
    attention_sinks: bool = False
    residual_scale: str = ""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    refuses: Mapping[str, str] = field(default_factory=dict, hash=False)


_NORMED_STREAM = "it norms the residual stream itself, so that what a head or an MLP writes does not stay in it"

_ADDED_IN_PLACE = "it adds what attention writes to the MLP's output in place, which is then no longer there to read"

GPT2 = Family(
    "gpt2",
    blocks="transformer.h",
    attention_output="attn.c_proj",
    mlp="mlp",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    projections=("attn.c_attn",),
    mlp_input="ln_2",
    down_projection="mlp.c_proj",
)
LLAMA = Family(
    "llama",
    blocks="model.layers",
    attention_output="self_attn.o_proj",
    mlp="mlp",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    mlp_input="post_attention_layernorm",
    down_projection="mlp.down_proj",
)
BLOOM = replace(
    LLAMA,
    model_type="bloom",
    blocks="transformer.h",
    attention_output="self_attention.dense",
    # Its MLP adds what the residual stream holds by itself.
    mlp="mlp.dense_4h_to_h",
    mlp_body="",
    final_norm="transformer.ln_f",
    projections=("self_attention.query_key_value",),
    down_projection="mlp.dense_4h_to_h",
    interleaved=True,
    refuses={"apply_residual_connection_post_layernorm": _NORMED_STREAM},
)
# These norm what attention and MLP write before it is added to the residual stream.
GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    mlp="post_feedforward_layernorm",
    post_norms=True,
    attention_post_norm="post_attention_layernorm",
    mlp_input="pre_feedforward_layernorm",
)

FAMILIES = {
    family.model_type: family
    for family in (
        GPT2,
        replace(
            GPT2,
            model_type="gpt_neo",
            attention_output="attn.attention.out_proj",
            projections=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        ),
        replace(
            GPT2,
            model_type="gptj",
            attention_output="attn.out_proj",
            parallel=True,
            projections=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            mlp_input="ln_1",
            down_projection="mlp.fc_out",
        ),
        LLAMA,
        *(replace(LLAMA, model_type=name) for name in ("mistral", "qwen2", "qwen3", "smollm3", "gemma", "olmo")),
        # Mixtures of experts: the whole layer of experts is the MLP.
        *(replace(LLAMA, model_type=name, down_projection="") for name in ("mixtral", "qwen3_moe")),
        replace(LLAMA, model_type="gpt_oss", down_projection="", attention_sinks=True),
        replace(LLAMA, model_type="olmoe", down_projection="", joint_norms=True),
        replace(LLAMA, model_type="granite", residual_scale="residual_multiplier"),
        replace(
            LLAMA,
            model_type="stablelm",
            variants={"use_parallel_residual": {"parallel": True, "mlp_input": "input_layernorm"}},
        ),
        BLOOM,
        replace(
            BLOOM,
            model_type="falcon",
            mlp="mlp",
            mlp_body="mlp",
            variants={"multi_query": {"interleaved": False}},
            refuses=dict.fromkeys(("parallel_attn", "new_decoder_architecture"), _ADDED_IN_PLACE),
        ),
        replace(LLAMA, model_type="phi3", projections=("self_attn.qkv_proj",)),
        replace(
            LLAMA,
            model_type="phi",
            attention_output="self_attn.dense",
            parallel=True,
            final_norm="model.final_layernorm",
            mlp_input="input_layernorm",
            down_projection="mlp.fc2",
        ),
        replace(
            LLAMA,
            model_type="gpt_neox",
            blocks="gpt_neox.layers",
            attention_output="attention.dense",
            variants={"use_parallel_residual": {"parallel": True}},
            final_norm="gpt_neox.final_layer_norm",
            projections=("attention.query_key_value",),
            down_projection="mlp.dense_4h_to_h",
            interleaved=True,
        ),
        replace(
            LLAMA,
            model_type="opt",
            blocks="model.decoder.layers",
            attention_output="self_attn.out_proj",
            mlp="fc2",
            mlp_body="",
            refuses={"not do_layer_norm_before": _NORMED_STREAM},
            final_norm="model.decoder.final_layer_norm",
            attention_norm="self_attn_layer_norm",
            mlp_input="final_layer_norm",
            down_projection="fc2",
        ),
        GEMMA2,
        replace(GEMMA2, model_type="gemma3_text"),
        # Attention and MLP read the residual stream without a norm.
        *(
            replace(GEMMA2, model_type=name, attention_norm="", mlp_input="mlp", joint_norms=True)
            for name in ("olmo2", "olmo3")
        ),
    )
}


def check_family(model_type: str) -> Family:
    """Look up a family.

    Raises:
        ModelError: the table has no such family; the message lists those that it has.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"Models of the family {model_type!r} are not supported. {nearest_names(model_type, FAMILIES)}\n"
            "Another decoder family is one entry in oa_train/models/families.py; docs/extending.md shows how."
        )
    return FAMILIES[model_type]


def check_config(config: Any) -> Family:
    """Look up the family of a configuration, in the variant that the configuration asks for.

    Raises:
        ModelError: the table has no such family, or its entry does not cover this model.
    """
    family = check_family(config.model_type)
    for condition, reason in family.refuses.items():
        name = condition.removeprefix("not ")
        if bool(getattr(config, name)) is (name == condition):
            raise ModelError(
                f"Models of the family {family.model_type!r} are not supported where {name} is "
                f"{getattr(config, name)}: {reason}."
            )
    changes = [change for name, change in family.variants.items() if getattr(config, name)]
    for change in changes:
        family = replace(family, **change)
    return family


def is_parallel(config: Any) -> bool:
    """True if attention and MLP of a block read the same residual stream in a model of this configuration.

    Raises:
        ModelError: as `check_config`.
    """
    return check_config(config).parallel


def n_kv_heads(config: Any) -> int:
    """Keys of an attention layer, and values: heads share them where there are fewer than queries."""
    if getattr(config, "multi_query", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or Dimensions.of(config).n_heads


@torch.no_grad()
def fold_residual_scale(model: Any) -> None:
    """Multiply the weights of what attention and MLP write last by the factor that a family's blocks have for it.

    The model computes the same, and what its parts write is what its residual stream gets.

    Raises:
        ModelError: the weights are quantised.
    """
    name = FAMILIES[model.config.model_type].residual_scale if model.config.model_type in FAMILIES else ""
    scale = getattr(model.config, name) if name else 1.0
    if scale == 1:
        return
    family = check_family(model.config.model_type)
    for block in model.get_submodule(family.blocks):
        for path in (family.attention_output, family.down_projection):
            for parameter in block.get_submodule(path).parameters():
                if not parameter.is_floating_point():
                    raise ModelError(
                        f"The blocks of this {family.model_type} model multiply what they add by {scale}, which "
                        "cannot be folded into quantised weights. Load it without lm.quantization."
                    )
                parameter.mul_(scale)
        setattr(block, name, 1.0)
    setattr(model.config, name, 1.0)


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model.

    Attributes:
        n_layers: decoder blocks.
        n_heads: attention heads of a block; with grouped keys and values, the query heads.
        d_head: width of one head's value.
        d_model: width of the residual stream.
        d_mlp: neurons of an MLP: width of what enters its down projection.
    """

    n_layers: int
    n_heads: int
    d_head: int
    d_model: int
    d_mlp: int

    @classmethod
    def of(cls, config: Any) -> "Dimensions":
        """Read the sizes from a Hugging Face configuration."""
        n_heads, d_model = config.num_attention_heads, config.hidden_size
        d_head = getattr(config, "head_dim", None) or d_model // n_heads
        widths = (
            getattr(config, name, None) for name in ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size")
        )
        d_mlp = next((width for width in widths if width), 4 * d_model)
        return cls(config.num_hidden_layers, n_heads, d_head, d_model, d_mlp)


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of one model at which units are read and replaced; tuples have one for each layer.

    Attributes:
        family: entry of the table.
        dimensions: sizes of the model.
        token_embedding: turns token ids into vectors.
        blocks: decoder blocks.
        attention_outputs: output projections of attention; their input is the concatenated heads.
        attentions: modules whose output attention adds to the residual stream: the output projection, or the norm
            after it.
        down_projections: projections that the MLP's neurons enter; no entries where there is no single one.
        mlps: modules whose output the MLP adds to the residual stream.
        final_norm: norm before the unembedding.
        unembedding: the last linear map, from the residual stream to logits.
    """

    family: Family
    dimensions: Dimensions
    token_embedding: nn.Module
    blocks: tuple[nn.Module, ...]
    attention_outputs: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    down_projections: tuple[nn.Module, ...]
    mlps: tuple[nn.Module, ...]
    final_norm: nn.Module
    unembedding: nn.Module


class Lookup:
    """Looks up modules of a model by path, and remembers where, so that a later swap is noticed."""

    def __init__(self) -> None:
        # Parents by weak references: one of them is the model, which a cache must not keep alive.
        self._children: list[tuple[weakref.ref[nn.Module], str, nn.Module, type[nn.Module]]] = []

    def get(self, module: nn.Module, path: str) -> nn.Module:
        """The module that a path leads to; raises AttributeError if it leads nowhere."""
        for name in path.split("."):
            child = module.get_submodule(name)
            self._children.append((weakref.ref(module), name, child, type(child)))
            module = child
        return module

    def find(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """The module itself, looked up by its path in a model."""
        return self.get(model, next(path for path, part in model.named_modules() if part is module))

    def holds(self) -> bool:
        """True if no module was swapped or has changed its class."""
        return all(
            getattr(parent(), "_modules", {}).get(name) is child and type(child) is kind
            for parent, name, child, kind in self._children
        )


_T = TypeVar("_T")
_lookups: "weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, Lookup]]]" = weakref.WeakKeyDictionary()


def looked_up(model: Any, find: Callable[[Any, Lookup], _T]) -> _T:
    """The result of a function on a model, cached until a module on the way is swapped.

    Args:
        model: a `PreTrainedModel`.
        find: gets every module from the lookup that it is passed, and keeps nothing but modules.

    Raises:
        ModelError: the model is not built as its entry in the family table says.
    """
    known = _lookups.setdefault(model, {})
    if find not in known or not known[find][1].holds():
        lookup = Lookup()
        try:
            known[find] = find(model, lookup), lookup
        except (AttributeError, TypeError) as problem:
            raise ModelError(
                f"This {model.config.model_type} model is not built as its entry in the family table says: {problem}. "
                "The table follows transformers 5; is the model's code older, newer, or its own?"
            ) from problem
    result: _T = known[find][0]
    return result


def find_parts(model: Any) -> Parts:
    """Find the parts of a Hugging Face causal language model; they are looked up once per model.

    Raises:
        ModelError: the family is not in the table, the model is not built as its entry says, it is compiled as a
            whole, or it is spread over several devices.
    """
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "This is torch.compile(model), which runs code that was compiled without the interventions.\nGive the "
            "model itself (model._orig_mod of the compiled one), or compile it in place with model.compile(): "
            "interventions then run the code that it was compiled from."
        )
    # What `from_pretrained(device_map=...)` leaves.
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise ModelError(f"This model is spread over {', '.join(devices)} (device_map). {WITHOUT_DEVICE_MAP}")
    return looked_up(model, _find_parts)


def _find_parts(model: Any, lookup: Lookup) -> Parts:
    family, sizes = check_config(model.config), Dimensions.of(model.config)
    if family.residual_scale and getattr(model.config, family.residual_scale) != 1:
        raise ModelError(
            f"The blocks of this {family.model_type} model multiply what they add by {family.residual_scale}. Load it "
            "with oa_train.load_model, or pass it to oa_train.models.loading.freeze: both fold the factor into the "
            "weights."
        )

    def of_blocks(path: str) -> tuple[nn.Module, ...]:
        return tuple(lookup.get(block, path) for block in blocks)

    listed: Any = lookup.get(model, family.blocks)
    blocks = tuple(lookup.get(listed, str(layer)) for layer in range(len(listed)))
    if len(blocks) != sizes.n_layers:
        raise ModelError(f"The configuration names {sizes.n_layers} layers, the model has {len(blocks)}.")
    attention_outputs = of_blocks(family.attention_output)
    down_projections = of_blocks(family.down_projection) if family.down_projection else ()
    for kind, modules, width, units in (
        (
            "attention output",
            attention_outputs,
            sizes.n_heads * sizes.d_head,
            f"{sizes.n_heads} heads of width {sizes.d_head}",
        ),
        ("down", down_projections, sizes.d_mlp, f"{sizes.d_mlp} neurons"),
    ):
        if any(linear_shape(module) != (width, sizes.d_model) for module in modules):
            raise ModelError(
                f"The {kind} projections of this {family.model_type} model do not map {units} to {sizes.d_model} "
                "dimensions."
            )
    return Parts(
        family=family,
        dimensions=sizes,
        token_embedding=lookup.find(model, model.get_input_embeddings()),
        blocks=blocks,
        attention_outputs=attention_outputs,
        attentions=of_blocks(family.attention_post_norm) if family.attention_post_norm else attention_outputs,
        down_projections=down_projections,
        mlps=of_blocks(family.mlp),
        final_norm=lookup.get(model, family.final_norm),
        unembedding=lookup.find(model, model.get_output_embeddings()),
    )


def linear_shape(module: Any) -> tuple[int, int] | None:
    """Input and output widths of a linear map, even if wrapped or quantised; None for other modules."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nf"):  # Hugging Face's Conv1D, whose weight is transposed
        return module.nx, module.nf
    base = getattr(module, "base_layer", None)  # of an adapter
    return None if base is None else linear_shape(base)
