"""Attribution: first-order estimate of the effect of ablating each entry, from one backward pass per prompt."""

from collections.abc import Iterable
from functools import partial

import torch

from oa_train.ablations.base import Ablation
from oa_train.batches import Batch
from oa_train.engine.chunks import ROWS_PER_RUN, chunks
from oa_train.engine.levels import masked_logits
from oa_train.engine.reading import read_values
from oa_train.metrics.measures import Loss, loss_of
from oa_train.models.frozen import CausalLM
from oa_train.models.levels import Level
from oa_train.progress import WITH_GRADIENTS, Advance
from oa_train.shapes import Float, Tensor


def mask_gradients(
    model: CausalLM,
    batches: Iterable[Batch],
    level: Level,
    ablation: Ablation,
    loss: Loss = "cross_entropy",
    rows_per_run: int = ROWS_PER_RUN,
    advance: Advance = lambda done: None,
) -> Float[Tensor, "prompt entry"]:
    """Gradient of each prompt's loss with respect to the mask at the clean model, on the CPU.

    Minus the gradient is the first-order effect of ablating an entry: attribution patching (Nanda, 2023) and, for
    edges, edge attribution patching (Syed et al., 2023), with the replacements of any ablation. The KL divergence from
    the clean model has its minimum there, so its gradient is zero and uninformative.

    The batches are on any device; a model run has `rows_per_run` prompts at most, which bounds memory and changes no
    result. `advance` counts passes.
    """
    ablation, gradients = ablation.to(model.device), []
    everything = torch.ones(1, len(level))
    for batch in batches:
        for piece, _ in chunks(model, level, batch.to(model.device), everything, rows_per_run, gradients=True):
            values = ablation.replacements(piece, partial(read_values, model, level=level))
            dtype = torch.promote_types(model.dtype, torch.float32)
            mask = torch.ones(len(piece), len(level), device=model.device, dtype=dtype, requires_grad=True)
            # With everything kept these are the clean logits.
            logits = masked_logits(model, piece, level, mask, values)
            losses = loss_of(loss, logits.detach(), logits, piece)
            gradients.append(torch.autograd.grad(losses.sum(), mask)[0].cpu())
            advance(WITH_GRADIENTS * len(piece))
    return torch.cat(gradients)
