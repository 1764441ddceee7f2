"""Measures and losses against a loop over prompts and scored positions."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from scipy.special import log_softmax, logsumexp
from torch.testing import assert_close

from oa_train.batches import Batch
from oa_train.errors import ConfigurationError
from oa_train.metrics.behaviour import cross_entropy
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES, Loss, check_loss, loss_of, measured
from tests.builders import random_batch

VOCABULARY = 11
N_SCORED = [3, 1, 2]  # of each prompt; what is missing up to 3 repeats the last with weight 0

# Of each prompt and scored position; prompt 1 has an answer fewer than others, one position of it no distractor.
ANSWERS = [[[1, 2], [4, -1], [10, 3]], [[7, -1]] * 3, [[0, 10], [5, 6], [5, 6]]]
DISTRACTORS = [[[3, -1, -1], [5, 6, 7], [0, 10, -1]], [[-1, -1, -1]] * 3, [[9, 8, -1], [10, -1, -1], [10, -1, -1]]]


def batch_of_several() -> Batch:
    return replace(
        random_batch([8, 5, 6]),
        scored=torch.tensor([[2, 4, 7], [4, 4, 4], [3, 5, 5]]),
        weights=torch.tensor([[1 / 3] * 3, [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]),
        answers=torch.tensor(ANSWERS),
        distractors=torch.tensor(DISTRACTORS),
    )


def logits_of(seed: int, scale: float = 3.0) -> torch.Tensor:
    """Logits that differ at every scored position, repetitions included, so that a wrong weight would show."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(3, 3, VOCABULARY, generator=generator, dtype=torch.float64)


def at_one_position(name: str, clean, logits, answers: list[int], distractors: list[int]) -> float:
    right, wrong = ([token for token in tokens if token >= 0] for tokens in (answers, distractors))
    log_p, log_q = log_softmax(clean), log_softmax(logits)
    if name == "kl":
        return sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
    if name == "accuracy":
        return float(max(range(VOCABULARY), key=lambda token: logits[token]) in right)
    if name == "cross_entropy":
        return -math.log(sum(math.exp(log_q[token]) for token in right))
    others = wrong or [token for token in range(VOCABULARY) if token not in right]
    return logsumexp([logits[token] for token in right]) - logsumexp([logits[token] for token in others])


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_is_the_mean_over_a_prompts_own_scored_positions(name):
    clean, logits, batch = logits_of(0), logits_of(1), batch_of_several()
    expected = []
    for row, n_scored in enumerate(N_SCORED):
        each = [
            at_one_position(name, clean[row, i].numpy(), logits[row, i].numpy(), ANSWERS[row][i], DISTRACTORS[row][i])
            for i in range(n_scored)
        ]
        expected.append(sum(each) / n_scored)
    # The weights of a third are float32.
    assert_close(measured(name, clean, logits, batch), torch.tensor(expected).double(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", MEASURES)
def test_repetitions_of_a_scored_position_do_not_count(name):
    clean, logits, batch = logits_of(0), logits_of(1), batch_of_several()
    before = measured(name, clean, logits, batch)
    for row, n_scored in enumerate(N_SCORED):
        clean[row, n_scored:], logits[row, n_scored:] = 100, -100
    assert torch.equal(measured(name, clean, logits, batch), before)


def test_accuracy_is_the_share_of_positions_that_are_right():
    logits = torch.zeros(3, 3, VOCABULARY)
    logits[0, 0, 2] = logits[0, 1, 4] = logits[0, 2, 1] = logits[1, 0, 6] = logits[2, 0, 10] = logits[2, 1, 6] = 1
    found = measured("accuracy", logits, logits, batch_of_several())
    assert_close(found, torch.tensor([2 / 3, 0, 1]))


@pytest.mark.parametrize("name", MEASURES)
def test_half_precision_is_measured_in_float32_and_float64_stays(name):
    clean, logits, batch = logits_of(0).bfloat16(), logits_of(1).bfloat16(), batch_of_several()
    found = measured(name, clean, logits, batch)
    assert found.dtype == torch.float32
    assert_close(found, measured(name, clean.float(), logits.float(), batch), rtol=0, atol=0)
    assert measured(name, clean.double(), logits.double(), batch).dtype == torch.float64


def test_cross_entropy_is_minus_the_log_of_the_answers_softmax_mass():
    logits, answers = logits_of(2), torch.tensor(ANSWERS)
    probability = logits.softmax(dim=-1)
    for row in range(3):
        for place in range(3):
            mass = sum(probability[row, place, token] for token in ANSWERS[row][place] if token >= 0)
            assert_close(cross_entropy(logits, answers)[row, place], -mass.log(), rtol=1e-13, atol=1e-14)


def test_cross_entropy_of_all_tokens_is_nothing_and_of_one_is_torchs():
    logits = logits_of(3)
    everything = torch.arange(VOCABULARY).expand(3, 3, -1)
    assert_close(cross_entropy(logits, everything), torch.zeros(3, 3).double(), rtol=0, atol=1e-14)
    one = torch.tensor([[3, 0, 10]] * 3)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), one.flatten(), reduction="none")
    assert_close(cross_entropy(logits, one.unsqueeze(-1)).flatten(), expected, rtol=1e-13, atol=1e-14)
    assert cross_entropy(logits * 1e4, one.unsqueeze(-1)).isfinite().all()


def test_losses_are_measures_of_which_more_is_worse():
    clean, logits, batch = logits_of(0), logits_of(1), batch_of_several()
    assert LOSS_SIGNS == {"kl": 1, "cross_entropy": 1, "logit_difference": -1}
    assert set(LOSS_SIGNS) == set(get_args(Loss))
    for name, sign in LOSS_SIGNS.items():
        assert torch.equal(loss_of(name, clean, logits, batch), sign * measured(name, clean, logits, batch))
    # Logits under which the answers are nearly certain lose less than those under which distractors are.
    sure = torch.zeros(3, 3, VOCABULARY).double()
    sure.scatter_(-1, batch.answers[..., :1], 9.0)
    unsure = torch.zeros(3, 3, VOCABULARY).double()
    unsure.scatter_(-1, batch.distractors[..., :1].clamp(min=0), 9.0)
    for name in LOSS_SIGNS:
        assert (loss_of(name, sure, sure, batch) < loss_of(name, sure, unsure, batch)).all()


@pytest.mark.parametrize("name", LOSS_SIGNS)
def test_gradients_are_those_of_finite_differences_and_finite_with_padding(name):
    clean, batch = logits_of(0), batch_of_several()
    logits = logits_of(1).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(name, clean, logits, batch).sum(), logits)
    assert gradient.isfinite().all()
    for row, n_scored in enumerate(N_SCORED):
        assert gradient[row, :n_scored].abs().amax(dim=-1).min() > 0
        assert not gradient[row, n_scored:].any()
    assert torch.autograd.gradcheck(lambda given: loss_of(name, clean, given, batch), (logits,))


@pytest.mark.parametrize("name", LOSS_SIGNS)
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_gradients_stay_finite_where_the_model_is_undecided_or_certain(name, scale):
    logits = logits_of(1, scale).float().requires_grad_()
    loss = loss_of(name, logits_of(0, scale).float(), logits, batch_of_several()).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSS_SIGNS)
def test_tokens_that_are_ruled_out_and_answer_nothing_change_nothing(name):
    clean, logits, batch = logits_of(0), logits_of(1), batch_of_several()
    batch = replace(batch, distractors=torch.full((3, 3, 1), -1))
    further = torch.full((3, 3, 4), -math.inf).double()
    wide = torch.cat([logits, further], dim=-1).requires_grad_()
    loss = loss_of(name, torch.cat([clean, further], dim=-1), wide, batch)
    (gradient,) = torch.autograd.grad(loss.sum(), wide)
    logits.requires_grad_()
    expected = loss_of(name, clean, logits, batch)
    assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    assert_close(gradient[..., :VOCABULARY], torch.autograd.grad(expected.sum(), logits)[0], rtol=1e-12, atol=1e-14)
    assert not gradient[..., VOCABULARY:].any()


def test_prompts_without_any_distractor_have_finite_gradients():
    batch = replace(batch_of_several(), distractors=torch.zeros(3, 3, 0, dtype=torch.long))
    logits = logits_of(1).requires_grad_()
    loss = loss_of("logit_difference", logits_of(0), logits, batch).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[0].any()


def test_a_loss_that_there_is_not_is_refused_with_the_nearest_name():
    for name in get_args(Loss):
        check_loss("loss", name)
    with pytest.raises(
        ConfigurationError, match=r"loss is 'crossentropy'; expected one of .*Did you mean .*cross_entropy"
    ):
        check_loss("loss", "crossentropy")
    with pytest.raises(ConfigurationError, match=r"model\.loss is 'accuracy'"):
        check_loss("model.loss", "accuracy")
