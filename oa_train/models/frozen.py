"""The frozen model: a plain `PreTrainedModel` in evaluation mode whose weights are never trained."""

from typing import Any

import torch
from transformers import PreTrainedModel

from oa_train.errors import ModelError
from oa_train.models.families import FAMILIES

# The class of every model here, under a name that other modules can import without importing transformers.
CausalLM = PreTrainedModel


def freeze(model: CausalLM) -> CausalLM:
    """Put a model into evaluation mode, turn off the gradients of its weights, and fold its `residual_scale`."""
    model.eval().requires_grad_(False)
    _fold_residual_scale(model)
    if model.dtype is not torch.bfloat16:
        model.set_experts_implementation("eager")  # the grouped products of all experts are made for bfloat16
    return model


@torch.no_grad()
def _fold_residual_scale(model: Any) -> None:
    """Fold the factor by which a family's blocks scale the outputs of attention and MLP into their last projections.

    The model computes the same function, and the outputs of its parts are what is added to the residual stream.

    Raises:
        ModelError: the weights are quantised.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None or not family.residual_scale:
        return
    name, scale = family.residual_scale, getattr(model.config, family.residual_scale)
    if scale == 1:
        return
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
