"""The check that stops training when a tensor becomes NaN or infinite."""

from collections.abc import Mapping

import torch

from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.errors import NotFiniteError
from oa_train.models.frozen import CausalLM
from oa_train.shapes import Tensor


@torch.no_grad()
def check_finite(
    tensors: Mapping[str, Tensor], label: str, model: CausalLM | None = None, batch: Batch | None = None
) -> None:
    """Stop when a tensor holds NaN or infinity.

    The message begins with `label`, a plural noun for the tensors, and says so if the model by itself fails on the
    batch.

    Raises:
        NotFiniteError: names the tensors that are not finite.
    """
    bad = ", ".join(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
    if not bad:
        return
    if model is not None and batch is not None:
        logits = scored_logits(model, batch)
        # A model may exclude tokens, with logits of -inf.
        if bool((logits.isnan() | logits.isposinf()).any()):
            raise NotFiniteError(
                f"{label} are not finite: {bad}.\nThe logits of the frozen model itself are not finite on these "
                "prompts: its weights hold NaN or infinity, or it overflows in its data type "
                f"(lm.dtype {str(model.dtype).removeprefix('torch.')})."
            )
    raise NotFiniteError(
        f"{label} are no longer finite: {bad}.\nLower the learning rates, clip gradients "
        "(--trainer.gradient_clip_val 1.0) or train in float32."
    )
