"""Reading what the sources of the clean model have, and their means over a stream of prompts."""

from collections.abc import Callable, Iterable

import torch

from oa_train.ablations.base import SourceValues
from oa_train.ablations.means import StreamingMeans
from oa_train.batches import Batch
from oa_train.engine.forward import protected, scored_logits
from oa_train.models.families import find_parts
from oa_train.models.loading import CausalLM
from oa_train.models.taps import Tap
from oa_train.shapes import Tensor


@torch.no_grad()
def source_values(model: CausalLM, batch: Batch) -> SourceValues:
    """Run the clean model and return the value of the embedding and of every head and MLP."""
    parts = find_parts(model)
    inputs: list[Tensor] = []
    heads: list[Tensor] = []
    mlps: list[Tensor] = []
    taps = [Tap(parts.blocks[0], "input", inputs.append)]
    taps += [Tap(module, "input", heads.append) for module in parts.attention_outputs]
    taps += [Tap(module, "output", mlps.append) for module in parts.mlps]
    scored_logits(model, batch, taps)
    # Heads come side by side, and some families put rows and positions into one dimension.
    rows, sizes = batch.tokens.shape, parts.dimensions
    by_head = torch.stack(heads).reshape(-1, *rows, sizes.n_heads, sizes.d_head)
    embedded, by_mlp = (torch.stack(one).reshape(-1, *rows, sizes.d_model) for one in (inputs, mlps))
    return SourceValues(embedded, by_head, by_mlp)


def source_means(
    model: CausalLM,
    batches: Iterable[Batch],
    bos_token_id: int | None,
    of: Callable[[Tensor], Tensor] = lambda value: value,
) -> StreamingMeans:
    """Sum the values of all sources over prompts, position by position.

    Args:
        model: frozen causal language model.
        batches: prompts, on any device.
        bos_token_id: left out of the sums where it is never ablated.
        of: applied to the values first, in float64; `torch.square` sums their squares.

    Returns:
        Sums over real tokens up to the last scored position; later tokens cannot influence the prediction.
    """
    means = StreamingMeans(bos_token_id)
    for batch in batches:
        shown = batch.to(model.device)
        columns = torch.arange(shown.tokens.shape[1], device=model.device)
        counted = shown.attention_mask & (columns <= shown.scored[:, -1:])
        counted &= ~protected(shown.tokens, shown.positions, bos_token_id)
        means.add(source_values(model, shown), shown.positions, counted, of)
    return means
