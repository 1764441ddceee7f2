"""Running the frozen model on a batch, as Hugging Face wrote it."""

from collections.abc import Iterable
from typing import Any

import torch

from oa_train.batches import Batch
from oa_train.models.families import find_parts
from oa_train.models.loading import CausalLM
from oa_train.models.taps import Tap, tapped
from oa_train.shapes import Bool, Float, Tensor


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward for a batch.

    Positions count from each row's first real token, so that padding on the left and on the right agree. Without
    padding neither mask nor positions are given, which lets the attention back end take its fastest path.
    """
    inputs: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
    if batch.padded:
        inputs |= {"attention_mask": batch.attention_mask.long(), "position_ids": batch.positions}
    return inputs


def scored_logits(model: CausalLM, batch: Batch, taps: Iterable[Tap] = ()) -> Float[Tensor, "row vocabulary"]:
    """Next-token logits at each row's scored position.

    Only that position passes through the unembedding, which for a small model is the largest matrix of all.

    Args:
        model: frozen causal language model.
        batch: prompts.
        taps: functions attached for this run.
    """
    rows = torch.arange(len(batch), device=batch.tokens.device)
    unembedding = find_parts(model).unembedding
    scored = Tap(unembedding, "input", lambda residual: residual[rows, batch.scored].unsqueeze(1))
    with tapped([*taps, scored]):
        logits: Tensor = model(**model_inputs(batch)).logits
    return logits.squeeze(1)


def protected(tokens: Tensor, positions: Tensor, bos_token_id: int | None) -> Bool[Tensor, "row position"]:
    """Which tokens are never ablated: a beginning-of-sequence token at the first position.

    Attention heads use it as a resting place and its activations are outliers, so that replacing them would measure
    something else than the component's part in the task.
    """
    if bos_token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return (positions == 0) & (tokens == bos_token_id)
