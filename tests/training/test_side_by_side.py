"""Losses in parts: the value and gradient of the whole, with one part in memory at a time."""

import torch
from torch.testing import assert_close

from oa_train.training.side_by_side import BestSlices, summed


def test_value_and_gradient_are_those_of_the_sum():
    first, second, unused = (torch.randn(3, requires_grad=True) for _ in range(3))
    parts = [lambda: first.square() * 1e-4, lambda: (first * second).exp(), lambda: second.sin()[:1]]
    values, total = summed(parts, [first, second, unused])
    expected = sum(part().sum() for part in parts)
    assert_close(total, expected)
    assert [len(value) for value in values] == [3, 3, 1]
    assert_close(values[1], parts[1]().detach())
    gradients = torch.autograd.grad(3 * total, [first, second])
    assert_close(gradients, torch.autograd.grad(3 * expected, [first, second]))


def test_a_part_is_gone_before_the_next_one_runs():
    weight, alive = torch.ones(2, requires_grad=True), []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            alive.append(True)
            return tensor * 2

        @staticmethod
        def backward(context, gradient):
            alive.pop()
            return gradient * 2

    def part():
        assert not alive
        return Watched.apply(weight)

    summed([part] * 3, [weight])


def test_the_best_slices_are_kept_and_nan_never_is():
    tensors = {"a": torch.zeros(3, 2), "b": torch.zeros(3)}
    best = BestSlices(tensors)
    assert not best.known()
    best.offer({"a": torch.ones(3, 2), "b": torch.ones(3)}, torch.tensor([1.0, float("nan"), 3.0]))
    best.offer({"a": torch.full((3, 2), 2.0), "b": torch.full((3,), 2.0)}, torch.tensor([2.0, 2.0, 2.0]))
    assert best.tensors()["a"][:, 0].tolist() == [1, 2, 2]
    assert best.tensors()["b"].tolist() == [1, 2, 2]
    assert best.loss.tolist() == [1, 2, 2]
    assert best.known()
    assert set(best.state_dict()) == {"a", "b", "loss"}
