"""Running the frozen model on a batch, as Hugging Face wrote it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from oa_train.batches import Batch
from oa_train.models.frozen import CausalLM
from oa_train.models.parts import find_parts
from oa_train.models.taps import Tap, changed_argument, recomputed, tapped, uncompiled
from oa_train.shapes import Float, Int, Tensor


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward for a batch.

    Positions count from each row's first real token, so that padding on the left and on the right agree. Without
    padding there are neither mask nor positions, which lets the attention back end take its fastest path.
    """
    inputs: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
    if batch.padded:
        inputs |= {"attention_mask": batch.attention_mask.long(), "position_ids": batch.positions}
    return inputs


def scored_logits(
    model: CausalLM,
    batch: Batch,
    taps: Iterable[Tap] = (),
    recompute: bool = False,
    scored: Int[Tensor, "row scored"] | None = None,
) -> Float[Tensor, "row scored vocabulary"]:
    """Next-token logits at each row's scored positions, with functions attached for this run.

    Only those positions pass through the unembedding, which in a small model is the largest matrix.
    `recompute` is activation checkpointing of each block: less memory, more time, the same result.
    `scored` are the scored columns if rows join during the run, see `prefix_logits`; by default the batch's.
    """
    columns = batch.scored if scored is None else scored
    rows = torch.arange(len(columns), device=columns.device).unsqueeze(1)
    parts = find_parts(model)
    attached_taps = [*taps, Tap(parts.unembedding, "input", lambda residual: residual[rows, columns])]
    attached = recomputed(parts.blocks, attached_taps) if recompute else tapped(attached_taps)
    with as_written(model), attached:
        logits: Tensor = model(**model_inputs(batch)).logits
    return logits


@contextmanager
def as_written(model: CausalLM) -> Iterator[None]:
    """Run a model's uncompiled code, in which hooks act, with finite attention masks.

    Hugging Face's eager attention masks columns by adding the lowest number of the model's dtype, and takes the
    softmax in float32, where the lowest number of float64 is minus infinity: a fully masked row, as at padding,
    becomes NaN, and in the next layer so does every token that masks it. The lowest number of float32 masks columns
    just as well; other dtypes have nothing lower and are left alone.
    """
    lowest = torch.finfo(torch.float32).min

    def raised(mask: Tensor) -> Tensor | None:
        return mask.clamp(min=lowest) if mask.is_floating_point() else None

    blocks = find_parts(model).blocks if torch.finfo(model.dtype).min < lowest else ()
    with uncompiled(model), changed_argument(blocks, "attention_mask", raised):
        yield
