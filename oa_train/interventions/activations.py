"""Reading component values of the clean model, and their means over a stream of prompts."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from oa_train.ablations.statistics import StreamingMeans
from oa_train.batches import Batch
from oa_train.interventions.base import protected, scored_logits
from oa_train.models.families import find_parts
from oa_train.models.loading import CausalLM
from oa_train.models.taps import Tap
from oa_train.shapes import Float, Tensor


@dataclass(frozen=True, eq=False)
class NodeValues:
    """Values of all components in one run.

    Attributes:
        heads: value of each head, the input of the attention output projection.
        mlps: output of each MLP.
    """

    heads: Float[Tensor, "layer batch position head d_head"]
    mlps: Float[Tensor, "layer batch position d_model"]


@torch.no_grad()
def node_values(model: CausalLM, batch: Batch) -> NodeValues:
    """Run the clean model and return the value of every head and MLP."""
    parts = find_parts(model)
    heads: list[Tensor] = []
    mlps: list[Tensor] = []
    taps = [Tap(module, "input", heads.append) for module in parts.attention_outputs]
    taps += [Tap(module, "output", mlps.append) for module in parts.mlps]
    scored_logits(model, batch, taps)
    shape = (parts.dimensions.n_heads, parts.dimensions.d_head)
    return NodeValues(torch.stack(heads).unflatten(-1, shape), torch.stack(mlps))


def node_means(model: CausalLM, batches: Iterable[Batch], bos_token_id: int | None) -> StreamingMeans:
    """Sum the values of all components over prompts, position by position.

    Args:
        model: frozen causal language model.
        batches: prompts, on any device.
        bos_token_id: left out of the sums where it is never ablated.

    Returns:
        Sums over real tokens up to the scored position; later tokens cannot influence the prediction.
    """
    means = StreamingMeans(bos_token_id)
    for batch in batches:
        shown = batch.to(model.device)
        columns = torch.arange(shown.tokens.shape[1], device=model.device)
        counted = shown.attention_mask & (columns <= shown.scored.unsqueeze(1))
        counted &= ~protected(shown.tokens, shown.positions, bos_token_id)
        values = node_values(model, shown)
        means.add(values.heads, values.mlps, shown.positions, counted)
    return means
