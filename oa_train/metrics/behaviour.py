"""Whether the prediction is right, and by how much."""

import torch

from oa_train.shapes import Bool, Float, Int, Tensor


def is_correct(logits: Float[Tensor, "*row vocabulary"], answers: Int[Tensor, "*row answer"]) -> Bool[Tensor, "*row"]:
    """Whether the top token is one of the answers.

    Args:
        logits: predictions.
        answers: ids of the correct tokens, padded with -1.
    """
    return (logits.argmax(dim=-1, keepdim=True) == answers).any(dim=-1)


def logit_difference(
    logits: Float[Tensor, "*row vocabulary"],
    answers: Int[Tensor, "*row answer"],
    distractors: Int[Tensor, "*row distractor"],
) -> Float[Tensor, "*row"]:
    """Log odds of the answers against the distractors.

    For one answer and one distractor this is the difference of their logits; for several it is the difference of the
    log-sum-exp of each set, the log of how much likelier the answers are together.

    Args:
        logits: predictions.
        answers: ids of the correct tokens, padded with -1.
        distractors: ids of the wrong tokens, padded with -1; a row without any is compared with all tokens that are
            not answers.
    """
    # Padding repeats the first answer, which is always there.
    everything_else = logits.scatter(-1, torch.where(answers < 0, answers[..., :1], answers), float("-inf"))
    rest = torch.logsumexp(everything_else, dim=-1)
    given = (distractors >= 0).any(dim=-1)
    return _log_mass(logits, answers) - torch.where(given, _log_mass(logits, distractors), rest)


def cross_entropy(
    logits: Float[Tensor, "*row vocabulary"], answers: Int[Tensor, "*row answer"]
) -> Float[Tensor, "*row"]:
    """Minus the log probability of the answers, together where there are several.

    Args:
        logits: predictions.
        answers: ids of the correct tokens, padded with -1.

    Returns:
        Nats; at least 0 up to rounding.
    """
    return torch.logsumexp(logits, dim=-1) - _log_mass(logits, answers)


def _log_mass(logits: Tensor, ids: Tensor) -> Tensor:
    if ids.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], float("-inf"))
    chosen = logits.gather(-1, ids.clamp(min=0))
    return torch.logsumexp(chosen.masked_fill(ids < 0, float("-inf")), dim=-1)
