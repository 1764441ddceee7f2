"""Models of three families into which weights are written: their norms do nothing, their MLPs are rectified."""

from collections.abc import Sequence
from typing import Any

from oa_train.models.frozen import CausalLM
from oa_train.models.loading import model_of_config
from oa_train.zoo.known.weights import EPSILON
from oa_train.zoo.tokenizer import BOS, PAD, SPECIAL


def gpt2(width: int, words: Sequence[str], **sizes: int) -> CausalLM:
    """A GPT-2, which has a table of positions.

    Args:
        width: width of the residual stream.
        words: the vocabulary, without special tokens.
        **sizes: `n_layers`; `n_heads` and `n_units` of the MLP in each; `n_positions`, the longest prompt.
    """
    names = {"n_embd": width, "n_layer": sizes["n_layers"], "n_head": sizes["n_heads"]}
    names |= {"n_inner": sizes["n_units"], "n_positions": sizes["n_positions"]}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return model_of_config(
        "gpt2",
        activation_function="relu",
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=False,
        **names,
        **dropout,
        **_vocabulary(words),
    )


def gpt_neox(width: int, words: Sequence[str], *, rotated: float, base: float, **sizes: int) -> CausalLM:
    """A GPT-NeoX, in which attention and MLP of a layer read the same residual stream.

    Args:
        width: width of the residual stream.
        words: the vocabulary, without special tokens.
        rotated: share of a head's dimensions that rotate with the position.
        base: pairs of these rotate by 1, base ** (-1 / pairs), ... radians per position.
        **sizes: those of `gpt2`.
    """
    return model_of_config(
        "gpt_neox",
        hidden_act="relu",
        layer_norm_eps=EPSILON,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": base, "partial_rotary_factor": rotated},
        **_sizes(width, **sizes),
        **_vocabulary(words),
    )


def llama(width: int, words: Sequence[str], *, base: float, n_groups: int, **sizes: int) -> CausalLM:
    """A Llama, with SiLU-gated MLPs and biases everywhere.

    Args:
        width: width of the residual stream.
        words: the vocabulary, without special tokens.
        base: pairs of a head's dimensions rotate by 1, base ** (-1 / pairs), ... radians per position.
        n_groups: number of key-value heads of a layer, each shared by several heads.
        **sizes: those of `gpt2`.
    """
    return model_of_config(
        "llama",
        num_key_value_heads=n_groups,
        rms_norm_eps=EPSILON,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        **_sizes(width, **sizes),
        **_vocabulary(words),
    )


def _sizes(width: int, *, n_layers: int, n_heads: int, n_units: int, n_positions: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": n_layers, "num_attention_heads": n_heads}
    return sizes | {"intermediate_size": n_units, "max_position_embeddings": n_positions}


def _vocabulary(words: Sequence[str]) -> dict[str, int]:
    ids = {"bos_token_id": BOS, "eos_token_id": BOS, "pad_token_id": PAD}
    return {"vocab_size": len(SPECIAL) + len(words)} | {name: SPECIAL.index(token) for name, token in ids.items()}
