"""Divergence of an ablated model's prediction from the clean model's."""

import torch.nn.functional as F

from oa_train.shapes import Float, Tensor


def kl_divergence(
    clean: Float[Tensor, "*clean vocabulary"], ablated: Float[Tensor, "*row vocabulary"]
) -> Float[Tensor, "*row"]:
    """KL divergence of the clean prediction from the ablated one, for each row, in nats.

    Clean rows are broadcast, so that one of them can be compared with several ablated rows.

    The sum over the vocabulary of p (log p - log q), with p clean and q ablated: the ablation loss gap of Li & Janson
    (2024). Tokens that the clean model rules out (a logit of minus infinity) add nothing, whatever q is; a token that
    only the ablated model rules out makes the divergence infinite. Computed in float32, or in float64 for float64
    logits.
    """
    clean_log = F.log_softmax(clean if clean.dtype.itemsize == 8 else clean.float(), dim=-1)
    ablated_log = F.log_softmax(ablated if ablated.dtype.itemsize == 8 else ablated.float(), dim=-1)
    clean_probability = clean_log.exp()
    # Filled before the product: 0 times infinity is NaN, in the value and in the gradient.
    difference = (clean_log - ablated_log).masked_fill_(clean_probability == 0, 0.0)
    return (clean_probability * difference).sum(dim=-1)
