"""Accuracy and logit difference by hand and against scipy."""

import numpy as np
import torch
from scipy.special import logsumexp

from oa_train.metrics.behaviour import is_correct, logit_difference

LOGITS = torch.tensor([[0.1, 2.0, -1.0, 0.5], [3.0, 2.0, -1.0, 0.5], [0.0, 0.0, 0.0, 9.0]], dtype=torch.float64)


def test_any_of_the_answers_may_be_on_top():
    answers = torch.tensor([[2, 1], [2, 1], [3, -1]])
    assert is_correct(LOGITS, answers).tolist() == [True, False, True]


def test_padding_is_never_an_answer():
    # Token 3 is the last of the vocabulary, which an index of -1 would also name.
    assert is_correct(LOGITS, torch.tensor([[0, -1], [-1, 0], [2, -1]])).tolist() == [False, True, False]


def test_one_answer_and_one_distractor_are_a_plain_difference():
    found = logit_difference(LOGITS, torch.tensor([[1], [0], [3]]), torch.tensor([[0], [1], [2]]))
    np.testing.assert_allclose(found.numpy(), [1.9, 1.0, 9.0], rtol=1e-14)


def test_sets_are_log_sum_exp():
    answers = torch.tensor([[1, 3], [0, -1], [3, 2]])
    distractors = torch.tensor([[0, 2, -1], [1, 2, 3], [-1, 0, -1]])
    expected = [
        logsumexp([2.0, 0.5]) - logsumexp([0.1, -1.0]),
        3.0 - logsumexp([2.0, -1.0, 0.5]),
        logsumexp([9.0, 0.0]) - 0.0,
    ]
    np.testing.assert_allclose(logit_difference(LOGITS, answers, distractors).numpy(), expected, rtol=1e-13)


def test_shifts_change_nothing_and_signs_turn_around():
    answers, distractors = torch.tensor([[1, 3]] * 3), torch.tensor([[0, 2]] * 3)
    there = logit_difference(LOGITS, answers, distractors)
    torch.testing.assert_close(logit_difference(LOGITS + 100, answers, distractors), there, rtol=0, atol=1e-12)
    torch.testing.assert_close(logit_difference(LOGITS, distractors, answers), -there)


def test_large_logits_do_not_overflow():
    found = logit_difference(LOGITS * 1e4, torch.tensor([[3, 2]] * 3), torch.tensor([[0, 1]] * 3))
    assert found.isfinite().all()


def test_without_distractors_answers_are_compared_with_everything_else():
    logits = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    answers = torch.tensor([[3, -1], [0, 6]])
    for none in (torch.full((2, 1), -1), torch.zeros(2, 0, dtype=torch.long)):
        found = logit_difference(logits, answers, none)
        for row, chosen in enumerate(([3], [0, 6])):
            mass = logits[row].softmax(dim=-1)[chosen].sum()
            torch.testing.assert_close(found[row], torch.log(mass / (1 - mass)))
