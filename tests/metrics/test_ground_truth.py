import pytest
import torch

from oa_train.metrics.ground_truth import recovery

TRUE = torch.tensor([True, True, False, False, False])


def test_figures_of_a_small_case() -> None:
    found = torch.tensor([True, False, True, False, False])
    scores = torch.tensor([3.0, -1.0, 2.0, -1.0, -7.0])
    figures = recovery(found, TRUE, scores)
    assert figures.precision == 0.5
    assert figures.recall == 0.5
    assert figures.f1 == 0.5
    # Of six pairs four are in order and one is tied.
    assert figures.auroc == pytest.approx(4.5 / 6)
    assert figures.as_json()["precision"] == 0.5


def test_a_perfect_find() -> None:
    figures = recovery(TRUE, TRUE, TRUE.float() * 1000 - 3)
    assert list(figures.as_json().values()) == [1.0] * 5


def test_finding_nothing_or_everything() -> None:
    nothing, everything = recovery(~TRUE & TRUE, TRUE), recovery(TRUE | ~TRUE, TRUE)
    assert (nothing.precision, nothing.recall, nothing.f1) == (0, 0, 0)
    assert (everything.precision, everything.recall) == (pytest.approx(0.4), 1)
    assert nothing.auroc is None
    assert recovery(TRUE, TRUE, torch.zeros(5)).auroc == 0.5


def test_only_the_order_of_scores_counts() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.15])
    figures = [recovery(TRUE, TRUE, one) for one in (scores, 1e6 * scores - 5, scores.log())]
    assert figures[0] == figures[1] == figures[2]


@pytest.mark.parametrize("truth", [torch.zeros(4).bool(), torch.ones(4).bool()])
def test_a_truth_that_leaves_nothing_to_find_is_refused(truth: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="leaves nothing to find"):
        recovery(truth, truth)
