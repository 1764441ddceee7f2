"""Taps change what they should, and nothing of them remains."""

import pytest
import torch
from torch import nn

from oa_train.models.hooks import Tap, changed_argument, replaced_forwards, tapped


class Double(nn.Module):
    def forward(self, x, offset=0.0):
        return 2 * x + offset


class Pair(nn.Module):
    def forward(self, x):
        return 2 * x, "cache"


X = torch.tensor([1.0, 5.0])


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_an_input_tap_acts_before_the_module_and_an_output_tap_after():
    module = Double()
    with tapped([Tap(module, "input", lambda x: x + 1)]):
        assert module(X).tolist() == [4.0, 12.0]
        assert module(X, 10.0).tolist() == [14.0, 22.0]
        assert module(X, offset=10.0).tolist() == [14.0, 22.0]
    with tapped([Tap(module, "output", lambda x: x + 1)]):
        assert module(X).tolist() == [3.0, 11.0]
    assert module(X).tolist() == [2.0, 10.0]


def test_several_taps_act_in_their_order():
    module = Double()
    taps = [Tap(module, "output", lambda x: x + 1), Tap(module, "output", lambda x: x * 10)]
    with tapped(taps):
        assert module(X).tolist() == [30.0, 110.0]


def test_the_first_element_of_a_tuple_is_tapped_and_the_rest_kept():
    module = Pair()
    with tapped([Tap(module, "output", lambda x: x + 1)]):
        value, rest = module(X)
    assert value.tolist() == [3.0, 11.0]
    assert rest == "cache"
    assert isinstance(module(X), tuple)


@pytest.mark.parametrize("name", ["x", "offset"])
def test_an_argument_is_changed_however_it_is_given(name):
    modules = [Double(), Double()]
    offset = torch.tensor([10.0, 10.0])
    expected = [14.0, 22.0] if name == "x" else [13.0, 21.0]
    with changed_argument(modules, name, lambda value: value + 1):
        for module in modules:
            for made in (module(X, offset), module(X, offset=offset), module(x=X, offset=offset)):
                assert made.tolist() == expected
    assert modules[0](X, offset).tolist() == [12.0, 20.0]
    assert not any(hooks(module) for module in modules)


@pytest.mark.parametrize("name", ["offset", "mask"])
def test_calls_without_the_argument_stay_as_they_are(name):
    module, seen = Double(), []
    with changed_argument([module], name, seen.append):
        assert module(X).tolist() == [2.0, 10.0]
        assert module(X, 1.0).tolist() == [3.0, 11.0]
        assert module(X, offset=X).tolist() == [3.0, 15.0]
    assert len(seen) == (name == "offset")


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", [Double, Pair])
def test_none_leaves_the_value_as_it_is(kind, side):
    module, seen = kind(), []
    expected = module(X)
    with tapped([Tap(module, side, seen.append)]):
        found = module(X)
    first, wanted = (found[0], expected[0]) if kind is Pair else (found, expected)
    assert torch.equal(first, wanted)
    assert type(found) is type(expected)
    assert torch.equal(seen[0], X if side == "input" else 2 * X)


def test_taps_are_removed_after_an_exception_in_the_context_and_in_a_tap():
    module = Double()
    taps = [Tap(module, "input", lambda x: x + 1), Tap(module, "output", lambda x: x + 1)]

    def fail(_: torch.Tensor | None) -> None:
        raise RuntimeError(f"with {hooks(module)} hooks")

    with pytest.raises(RuntimeError, match="with 2 hooks"), tapped(taps):
        fail(None)
    assert hooks(module) == 0

    with pytest.raises(RuntimeError, match="with 3 hooks"), tapped([*taps, Tap(module, "output", fail)]):
        module(X)
    assert hooks(module) == 0
    assert module(X).tolist() == [2.0, 10.0]


def test_taps_are_removed_when_one_of_them_cannot_be_attached():
    module = Double()
    with pytest.raises(AttributeError), tapped([Tap(module, "input", lambda x: x), Tap.__new__(Tap)]):
        pytest.fail("the context was entered")
    assert hooks(module) == 0


def test_other_hooks_stay():
    module = Double()
    module.register_forward_hook(lambda _, __, output: output + 100)
    with tapped([Tap(module, "output", lambda x: x * 0)]):
        assert module(X).tolist() == [0.0, 0.0]
    assert module(X).tolist() == [102.0, 110.0]


def test_contexts_nest():
    module = Double()
    with tapped([Tap(module, "output", lambda x: x + 1)]):
        with tapped([Tap(module, "output", lambda x: x * 10)]):
            assert module(X).tolist() == [30.0, 110.0]
        assert module(X).tolist() == [3.0, 11.0]


def test_gradients_pass_through_taps():
    module, scale = Double(), torch.tensor(3.0, requires_grad=True)
    with tapped([Tap(module, "input", lambda x: x * scale)]):
        module(X).sum().backward()
    assert scale.grad.item() == 12.0


def test_forwards_are_replaced_one_within_the_other_and_come_back():
    module = Double()
    before = module(X)
    with replaced_forwards([(module, lambda x: x * 10)]):
        with replaced_forwards([(module, lambda x: x * 100)]):
            assert module(X).tolist() == (X * 100).tolist()
        assert module(X).tolist() == (X * 10).tolist()
    assert "forward" not in vars(module)
    with pytest.raises(RuntimeError, match="inside"), replaced_forwards([(module, lambda x: x)]):
        raise RuntimeError("inside")
    assert torch.equal(module(X), before)
