"""The parts of one model, found at the paths in the table of families, and its sizes."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from oa_train.errors import ModelError
from oa_train.models.families import Family, check_config
from oa_train.models.module_lookup import Lookup, looked_up

WITHOUT_DEVICE_MAP = (
    "Masks and constants are on one device and are mixed into every layer, so all layers have to be there too. Load "
    "the model onto one device, in bfloat16 if it is large (lm.dtype); --trainer.strategy fsdp shards one that is "
    "larger still."
)


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model.

    Attributes:
        n_layers: number of decoder blocks.
        n_heads: number of attention heads of a block; with grouped keys and values, of query heads.
        d_head: width of one head's value.
        d_model: width of the residual stream.
        d_mlp: number of neurons of an MLP, the input width of its down projection.
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


def n_kv_heads(config: Any) -> int:
    """Number of key-value heads of an attention layer; if they are fewer than the query heads, those share them."""
    if getattr(config, "multi_query", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or Dimensions.of(config).n_heads


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of one model at which units are read and replaced; tuples have one module for each layer.

    Attributes:
        family: the model's entry in the table of families.
        dimensions: sizes of the model.
        token_embedding: turns token ids into vectors.
        blocks: decoder blocks.
        attention_outputs: output projections of attention; their input is the concatenated heads.
        attentions: modules whose output attention adds to the residual stream: the output projection, or the norm
            after it.
        down_projections: projections that read the MLPs' neurons; empty if there is no single one in a layer.
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


def find_parts(model: Any) -> Parts:
    """Find the parts of a Hugging Face causal language model; the result is cached for each model.

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
    # Attribute that `from_pretrained(device_map=...)` sets.
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise ModelError(f"This model is spread over {', '.join(devices)} (device_map). {WITHOUT_DEVICE_MAP}")
    return looked_up(model, _find_parts)


def _find_parts(model: Any, lookup: Lookup) -> Parts:
    family, sizes = check_config(model.config), Dimensions.of(model.config)
    if family.residual_scale and getattr(model.config, family.residual_scale) != 1:
        raise ModelError(
            f"The blocks of this {family.model_type} model multiply what they add by {family.residual_scale}. Load it "
            "with oa_train.load_model, or pass it to oa_train.models.frozen.freeze: both fold the factor into the "
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
        if any(_linear_shape(module) != (width, sizes.d_model) for module in modules):
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


def _linear_shape(module: Any) -> tuple[int, int] | None:
    """Input and output widths of a linear map, even if wrapped or quantised; None for other modules."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nf"):  # Hugging Face's Conv1D, whose weight is transposed
        return module.nx, module.nf
    base = getattr(module, "base_layer", None)  # the linear map inside an adapter
    return None if base is None else _linear_shape(base)
