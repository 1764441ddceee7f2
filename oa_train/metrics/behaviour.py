"""Correctness of predictions, from logits and the token ids of answers and distractors (padded with -1)."""

import torch

from oa_train.shapes import Bool, Float, Int, Tensor


def is_correct(logits: Float[Tensor, "*row vocabulary"], answers: Int[Tensor, "*row answer"]) -> Bool[Tensor, "*row"]:
    """True where the top token is one of the answers."""
    return (logits.argmax(dim=-1, keepdim=True) == answers).any(dim=-1)


def logit_difference(
    logits: Float[Tensor, "*row vocabulary"],
    answers: Int[Tensor, "*row answer"],
    distractors: Int[Tensor, "*row distractor"],
) -> Float[Tensor, "*row"]:
    """Log odds of the answers against the distractors.

    For one answer and one distractor this is the difference between their logits; for several it is the difference
    between the log-sum-exps of the two sets, the log of the ratio of their total probabilities. In a row without
    distractors, all tokens that are not answers take their place.
    """
    # Padding is replaced with the first answer, which always exists.
    everything_else = logits.scatter(-1, torch.where(answers < 0, answers[..., :1], answers), float("-inf"))
    rest = torch.logsumexp(everything_else, dim=-1)
    has_distractors = (distractors >= 0).any(dim=-1)
    return _log_mass(logits, answers) - torch.where(has_distractors, _log_mass(logits, distractors), rest)


def cross_entropy(
    logits: Float[Tensor, "*row vocabulary"], answers: Int[Tensor, "*row answer"]
) -> Float[Tensor, "*row"]:
    """Negative log of the total probability of the answers, in nats."""
    return torch.logsumexp(logits, dim=-1) - _log_mass(logits, answers)


def _log_mass(logits: Tensor, ids: Tensor) -> Tensor:
    if ids.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], float("-inf"))
    chosen = logits.gather(-1, ids.clamp(min=0))
    return torch.logsumexp(chosen.masked_fill(ids < 0, float("-inf")), dim=-1)
