"""Configurations of the families in which models are written by hand: norms that do nothing, rectified MLPs."""

from collections.abc import Sequence
from typing import Any

from oa_train.models.loading import CausalLM, model_of_config
from oa_train.zoo.known.vocabulary import special_settings
from oa_train.zoo.known.weights import EPSILON


def gpt2(width: int, words: Sequence[str], **sizes: Any) -> CausalLM:
    """A GPT-2, whose positions are in a table."""
    return model_of_config(
        "gpt2",
        n_embd=width,
        activation_function="relu",
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **special_settings(words),
        **sizes,
    )


def gpt_neox(width: int, words: Sequence[str], rotated: float, base: float, **sizes: Any) -> CausalLM:
    """A GPT-NeoX, in which attention and MLP of a layer read the same.

    Args:
        width: of the residual stream.
        words: of the vocabulary.
        rotated: share of a head's dimensions that positions turn.
        base: the pairs turn by 1, base ** (-1 / pairs), ... radians a position.
        **sizes: further settings.
    """
    return model_of_config(
        "gpt_neox",
        hidden_size=width,
        hidden_act="relu",
        layer_norm_eps=EPSILON,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": base, "partial_rotary_factor": rotated},
        **special_settings(words),
        **sizes,
    )


def llama(width: int, words: Sequence[str], base: float, **sizes: Any) -> CausalLM:
    """A Llama, with SiLU-gated MLPs and biases everywhere.

    Args:
        width: of the residual stream.
        words: of the vocabulary.
        base: the pairs of a head's dimensions turn by 1, base ** (-1 / pairs), ... radians a position.
        **sizes: further settings.
    """
    return model_of_config(
        "llama",
        hidden_size=width,
        rms_norm_eps=EPSILON,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        **special_settings(words),
        **sizes,
    )
