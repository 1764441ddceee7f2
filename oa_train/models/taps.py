"""Attaching functions to a model's modules, and removing them; this happens nowhere else.

Interventions supply the functions. The model is restored at the end of a context, even after an exception.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# From a tensor to the one that takes its place, or to None to leave it unchanged.
TensorFunction = Callable[[Tensor], Tensor | None]
# Takes the arguments of a call; returns those that it is made with.
CallFunction = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Tap:
    """A function at a module's first positional argument (`input`), or at the tensor that it returns (`output`).

    If the module returns a tuple, it is the first element.
    """

    module: nn.Module
    side: Literal["input", "output"]
    function: TensorFunction


@contextmanager
def tapped(taps: Iterable[Tap]) -> Iterator[None]:
    """Attach functions for the length of the context."""
    with ExitStack() as stack:
        for tap in taps:
            if tap.side == "input":
                handle = tap.module.register_forward_pre_hook(_input_hook(tap.function))
            else:
                handle = tap.module.register_forward_hook(_output_hook(tap.function))
            stack.callback(handle.remove)
        yield


@contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the forward methods of modules inside the context; their taps still act."""
    with ExitStack() as stack:
        for module, forward in forwards:
            stack.enter_context(replaced_attributes(module, forward=forward))
        yield


@contextmanager
def replaced_attributes(module: nn.Module, **replacements: Callable[..., Any]) -> Iterator[None]:
    """Shadow methods of one module, for the length of the context."""
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            before = vars(module).get(name)
            setattr(module, name, replacement)
            if before is None:
                stack.callback(delattr, module, name)
            else:
                stack.callback(setattr, module, name, before)
        yield


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run every module uncompiled inside the context: compiled code ignores functions attached later."""
    with ExitStack() as stack:
        for module in model.modules():
            if module._compiled_call_impl is not None:
                stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
                module._compiled_call_impl = None
            original = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
            if original is not None:
                stack.enter_context(replaced_attributes(module, forward=original))
        yield


@contextmanager
def recomputed(blocks: Iterable[nn.Module], taps: Iterable[Tap] = ()) -> Iterator[None]:
    """Attach functions, with activation checkpointing of each block.

    A function inside a block is attached whenever the block runs, so that its recomputation, after the context has
    ended, is the same as its first run.

    Args:
        blocks: modules, none inside another; random numbers must not enter their results.
        taps: functions inside the blocks or elsewhere.
    """
    elsewhere, forwards = list(taps), []
    for block in blocks:
        parts = set(block.modules()) - {block}
        inside = [tap for tap in elsewhere if tap.module in parts]
        elsewhere = [tap for tap in elsewhere if tap.module not in parts]
        forwards.append((block, _rerunnable(block.forward, inside)))
    with replaced_forwards(forwards), tapped(elsewhere):
        yield


def _rerunnable(forward: Callable[..., Any], taps: list[Tap]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with tapped(taps):
            return forward(*args, **kwargs)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return checkpointed


@contextmanager
def changed_calls(changes: Iterable[tuple[nn.Module, CallFunction]]) -> Iterator[None]:
    """Let functions change the arguments of modules' calls inside the context.

    They act before functions that are attached later.
    """
    with ExitStack() as stack:
        for module, change in changes:
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, change=change: change(args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield


@contextmanager
def changed_argument(modules: Iterable[nn.Module], name: str, function: TensorFunction) -> Iterator[None]:
    """Let a function change the tensor argument of that name in every call that has one, inside the context."""
    with ExitStack() as stack:
        for module in modules:
            hook = _argument_hook(module, name, function)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _argument_hook(module: nn.Module, name: str, function: TensorFunction) -> Callable[..., Any]:
    parameters = signature(module.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = parameters.bind(*args, **kwargs)
        argument = call.arguments.get(name)
        changed = function(argument) if isinstance(argument, Tensor) else None
        if changed is None:
            return None
        call.arguments[name] = changed
        return call.args, call.kwargs

    return hook


def _input_hook(function: TensorFunction) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = function(args[0])
        return None if changed is None else (changed, *args[1:])

    return hook


def _output_hook(function: TensorFunction) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return function(output)
        changed = function(output[0])
        return None if changed is None else (changed, *output[1:])

    return hook
