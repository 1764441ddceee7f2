"""Distance of an ablated model's prediction from the clean model's."""

import torch.nn.functional as F

from oa_train.shapes import Float, Tensor


def kl_divergence(
    clean: Float[Tensor, "*clean vocabulary"], ablated: Float[Tensor, "*row vocabulary"]
) -> Float[Tensor, "*row"]:
    """KL divergence of the clean prediction from the ablated one, for each row, in nats.

    The rows of the clean predictions are broadcast, so that one may serve several ablated ones.

    Sum over the vocabulary of p (log p - log q), p clean and q ablated: the ablation loss gap of Li & Janson (2024).
    Tokens that the clean model rules out (a logit of minus infinity) add nothing, whatever q is; one that only the
    ablated model rules out makes the divergence infinite. Computed in float32, or in float64 where the logits are.
    """
    clean_log = F.log_softmax(clean if clean.dtype.itemsize == 8 else clean.float(), dim=-1)
    ablated_log = F.log_softmax(ablated if ablated.dtype.itemsize == 8 else ablated.float(), dim=-1)
    clean_probability = clean_log.exp()
    # Filled before it is multiplied: 0 times infinity is NaN, in the value as in the gradient.
    difference = (clean_log - ablated_log).masked_fill_(clean_probability == 0, 0.0)
    return (clean_probability * difference).sum(dim=-1)
