"""Hooks on a model's modules, and replaced methods; no other file attaches any.

Each context restores the model when it ends, even after an exception.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import Signature, signature
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

# Maps a tensor to the one that replaces it; None leaves it unchanged.
TensorFunction = Callable[[Tensor], Tensor | None]
# Maps the positional and keyword arguments of a call to those that replace them; None leaves them unchanged.
CallFunction = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]


@dataclass(frozen=True)
class Tap:
    """A function of a module's first positional argument (`input`), or of its output (the first item of a tuple)."""

    module: nn.Module
    side: Literal["input", "output"]
    function: TensorFunction

    def attach(self) -> RemovableHandle:
        """Register the function as a hook."""
        if self.side == "input":
            return self.module.register_forward_pre_hook(self._on_input)
        return self.module.register_forward_hook(self._on_output)

    def _on_input(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = self.function(args[0])
        return None if changed is None else (changed, *args[1:])

    def _on_output(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return self.function(output)
        changed = self.function(output[0])
        return None if changed is None else (changed, *output[1:])


@contextmanager
def _hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the context; iterating over `handles` registers them."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def tapped(taps: Iterable[Tap]) -> AbstractContextManager[None]:
    """Attach taps inside the context."""
    return _hooked(tap.attach() for tap in taps)


@contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the forward methods of modules inside the context; hooks on them still run."""
    with ExitStack() as stack:
        for module, forward in forwards:
            stack.enter_context(replaced_attributes(module, forward=forward))
        yield


@contextmanager
def replaced_attributes(module: nn.Module, **replacements: Callable[..., Any]) -> Iterator[None]:
    """Replace methods of one module inside the context."""
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
    """Run every module uncompiled inside the context, because compiled code ignores hooks that are attached later."""
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
    """Attach taps inside the context, with activation checkpointing of each block.

    A tap inside a block is attached whenever the block runs, so that it also acts in the recomputation, which may
    happen after the context has ended.

    Args:
        blocks: modules, none inside another, that draw no random numbers.
        taps: taps inside the blocks or elsewhere.
    """
    elsewhere, forwards = list(taps), []
    for block in blocks:
        parts = set(block.modules()) - {block}
        inside = [tap for tap in elsewhere if tap.module in parts]
        elsewhere = [tap for tap in elsewhere if tap.module not in parts]
        forwards.append((block, _checkpointed(block.forward, inside)))
    with replaced_forwards(forwards), tapped(elsewhere):
        yield


def _checkpointed(forward: Callable[..., Any], taps: list[Tap]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with tapped(taps):
            return forward(*args, **kwargs)

    return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


def foreign_hooks(hooks: Iterable[Any], known: tuple[str, ...] = ("oa_train.",)) -> list[Any]:
    """Hooks from packages that are not known; FSDP and transformers always are, because theirs change nothing."""
    known = (*known, "torch.distributed.", "transformers.")
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(known)]


def replaced_forward(module: nn.Module) -> list[Any]:
    """The forward method that replaces that of a module's class, if any; torch.compile's does not count."""
    forward = vars(module).get("forward")
    return [] if forward is None or hasattr(forward, "_torchdynamo_orig_callable") else [forward]


def changed_calls(changes: Iterable[tuple[nn.Module, CallFunction]]) -> AbstractContextManager[None]:
    """Change the arguments of modules' calls inside the context, before hooks that are attached later act."""

    def hook(change: CallFunction) -> Callable[..., Any]:
        return lambda _, args, kwargs: change(args, kwargs)

    return _hooked(module.register_forward_pre_hook(hook(change), with_kwargs=True) for module, change in changes)


def changed_argument(
    modules: Iterable[nn.Module], name: str, function: TensorFunction
) -> AbstractContextManager[None]:
    """Inside the context, change the tensor argument `name` in every call that has one."""

    def change(parameters: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = parameters.bind(*args, **kwargs)
        argument = call.arguments.get(name)
        changed = function(argument) if isinstance(argument, Tensor) else None
        if changed is None:
            return None
        call.arguments[name] = changed
        return call.args, call.kwargs

    return changed_calls((module, partial(change, signature(module.forward))) for module in modules)
