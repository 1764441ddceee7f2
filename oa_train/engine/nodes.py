"""Node interventions: attention heads and MLPs mixed with their replacements.

value = mask * value + (1 - mask) * replacement, at the input of each attention output projection for every head and
at the output of each MLP. The biases of the output projection belong to the layer and are never ablated.
`diagnostics.reference` does the same slowly and obviously.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from oa_train.ablations.base import SourceValues
from oa_train.batches import Batch
from oa_train.engine.forward import protected, scored_logits
from oa_train.models.families import find_parts
from oa_train.models.loading import CausalLM
from oa_train.models.taps import Tap
from oa_train.shapes import Float, Tensor

# Below this a mask entry counts as ablated and its constant receives gradients. A constant is to be the best
# replacement of a component that is gone; trained on mixtures as well, it would learn to correct their scale instead
# (Li & Janson 2024, appendix on partial ablation).
ABLATED_BELOW = 1e-3


def node_logits(
    model: CausalLM,
    batch: Batch,
    mask: Float[Tensor, "row component"],
    replacements: SourceValues,
    bos_token_id: int | None,
    recompute: bool = False,
) -> Float[Tensor, "row scored vocabulary"]:
    """Logits at the scored positions with components mixed with their replacements.

    Args:
        model: frozen causal language model.
        batch: one prompt for each row of the mask.
        mask: 1 keeps a component, 0 ablates it; gradients flow to it from both sides of the mixture.
        replacements: what stands in; receives gradients where the mask is below `ABLATED_BELOW` only.
        bos_token_id: this token is never ablated at the first position.
        recompute: see `scored_logits`.
    """
    everywhere = spread_mask(mask, protected(batch.tokens, batch.positions, bos_token_id))
    return scored_logits(model, batch, node_taps(model, everywhere, replacements), recompute)


def spread_mask(mask: Float[Tensor, "row component"], kept: Tensor) -> Float[Tensor, "row position component"]:
    """Give every position its row's mask, and 1 where `kept` [row, position] is true."""
    return torch.where(kept.unsqueeze(-1), 1.0, mask.unsqueeze(1))


def node_taps(model: CausalLM, mask: Float[Tensor, "row position component"], replacements: SourceValues) -> list[Tap]:
    """The functions that mix every head and MLP with its replacement.

    Args:
        model: the model they are for.
        mask: a mask for each position.
        replacements: what stands in.
    """
    parts = find_parts(model)
    by_layer = mask.unflatten(-1, (parts.dimensions.n_layers, -1))
    taps: list[Tap] = []
    for layer, (projection, mlp) in enumerate(zip(parts.attention_outputs, parts.mlps, strict=True)):
        of_heads, of_mlp = by_layer[:, :, layer, :-1, None], by_layer[:, :, layer, -1:]
        taps.append(Tap(projection, "input", _mixer(of_heads, replacements.heads[layer])))
        taps.append(Tap(mlp, "output", _mixer(of_mlp, replacements.mlps[layer])))
    return taps


def _mixer(mask: Tensor, replacement: Tensor) -> Callable[[Tensor], Tensor]:
    def mix(value: Tensor) -> Tensor:
        # Heads come side by side, and some families put rows and positions into one dimension.
        laid_out = value.reshape(*mask.shape[:2], *replacement.shape[2:])
        mixed: Tensor = _Mixture.apply(laid_out, mask, replacement)
        return mixed.reshape(value.shape)

    return mix


class _Mixture(torch.autograd.Function):
    """mask * value + (1 - mask) * replacement; the replacement's gradient comes from where it stands alone.

    Written out because autograd would keep the replacement spread over all rows and positions, and in half precision a
    copy of that as well, for every layer.
    """

    @staticmethod
    def forward(context: Any, value: Tensor, mask: Tensor, replacement: Tensor) -> Tensor:
        context.save_for_backward(value, mask, replacement)
        # lerp is exact at both ends: mask 1 returns the value bit for bit, mask 0 the replacement.
        return torch.lerp(replacement.to(value.dtype), value, mask.to(value.dtype))

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        value, mask, replacement = context.saved_tensors
        to_value, to_mask, to_replacement = None, None, None
        if context.needs_input_grad[0]:
            to_value = gradient * mask.to(gradient.dtype)
        if context.needs_input_grad[1]:
            passed = gradient * (value - replacement.to(value.dtype))
            to_mask = passed.sum(dim=-1, keepdim=True, dtype=mask.dtype)
        if context.needs_input_grad[2]:
            alone = gradient * torch.where(mask < ABLATED_BELOW, 1 - mask, 0.0).to(gradient.dtype)
            shared = [dim for dim in (0, 1) if replacement.shape[dim] == 1]
            summed = alone.sum(dim=shared, keepdim=True, dtype=replacement.dtype) if shared else alone
            to_replacement = summed.to(replacement.dtype)
        return to_value, to_mask, to_replacement
