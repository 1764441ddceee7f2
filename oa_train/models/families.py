"""The table of model families.

A family is data: the paths at which Hugging Face's classes keep their decoder blocks, attention output projections and
MLPs. None of a family's arithmetic is repeated here. To support another family, add one entry to `FAMILIES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from oa_train.errors import ModelError, nearest_names


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
        attention_norm: path to the norm through which attention reads the residual stream; empty if there is none.
        projections: paths to the query, key and value projections, or to a fused one: all queries first, then all
            keys, then all values.
        mlp_input: path to the module through which the MLP reads the residual stream: its norm.
        down_projection: path to the projection that reads the MLP's neurons; empty if there is no single one, as in
            mixtures of experts.
        mlp_body: path to the token-wise module with the MLP's hidden layer, which `recompute` runs again, and which
            runs at some tokens only in the last layer. Its first argument must be [row, position, width], and no other
            may differ by token; empty if that does not hold, or if the block has the hidden layer itself.
        interleaved: whether a fused projection interleaves each head's query, key and value.
        parallel: whether attention and MLP of a block read the same residual stream, so that the MLP does not read
            the heads of its own layer.
        post_norms: whether the outputs of attention and MLP are normed before they are added to the residual stream.
        attention_post_norm: path to that norm of attention.
        joint_norms: whether the queries of all heads, and their keys, are normed together, so that the input of one
            head changes the other heads' queries.
        attention_sinks: whether attention weights add up to less than 1, so that heads are not averages of values.
        residual_scale: attribute of the configuration and the blocks that scales the outputs of attention and MLP;
            `freeze` folds it into the weights of their last projections.
        variants: changed fields of this entry, by the configuration attribute that must be set for them.
        refuses: reasons why models of the family are not supported, by the configuration attribute that is set in
            them, or not set if its name is preceded by `not `.
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
    # Its MLP module adds the residual stream itself.
    mlp="mlp.dense_4h_to_h",
    mlp_body="",
    final_norm="transformer.ln_f",
    projections=("self_attention.query_key_value",),
    down_projection="mlp.dense_4h_to_h",
    interleaved=True,
    refuses={"apply_residual_connection_post_layernorm": _NORMED_STREAM},
)

# These norm the outputs of attention and MLP before they are added to the residual stream.
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
        # Mixtures of experts: the whole expert layer is the MLP.
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
        ModelError: the table has no such family; the message lists those it has.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"Models of the family {model_type!r} are not supported. {nearest_names(model_type, FAMILIES)}\n"
            "Another decoder family is one entry in oa_train/models/families.py; docs/extending.md shows how."
        )
    return FAMILIES[model_type]


def check_config(config: Any) -> Family:
    """Look up the family of a configuration, in the variant that the configuration selects.

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
