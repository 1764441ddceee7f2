"""How far an ablated model's prediction is from the clean model's."""

import torch.nn.functional as F

from oa_train.shapes import Float, Tensor


def kl_divergence(
    clean: Float[Tensor, "*row vocabulary"], ablated: Float[Tensor, "*row vocabulary"]
) -> Float[Tensor, "*row"]:
    """KL divergence of the clean prediction from the ablated one, for each row.

    Sum over the vocabulary of p (log p - log q), p clean and q ablated: the ablation loss gap of Li & Janson (2024).
    Computed in float32, or in float64 where that is given.

    Args:
        clean: logits of the clean model.
        ablated: logits of the ablated model.

    Returns:
        Nats; at least 0 up to rounding.
    """
    clean_log = F.log_softmax(clean if clean.dtype.itemsize == 8 else clean.float(), dim=-1)
    ablated_log = F.log_softmax(ablated if ablated.dtype.itemsize == 8 else ablated.float(), dim=-1)
    return F.kl_div(ablated_log, clean_log, reduction="none", log_target=True).sum(dim=-1)
