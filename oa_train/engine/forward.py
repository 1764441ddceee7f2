"""Running the frozen model on a batch, as Hugging Face wrote it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from oa_train.batches import Batch
from oa_train.models.frozen import CausalLM
from oa_train.models.hooks import (
    CallFunction,
    Tap,
    changed_argument,
    changed_calls,
    foreign_hooks,
    recomputed,
    replaced_forward,
    replaced_forwards,
    tapped,
    uncompiled,
)
from oa_train.models.parts import Parts, find_parts
from oa_train.shapes import Float, Int, Tensor


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward for a batch.

    Positions count from each row's first real token, so that left and right padding give the same result.
    Without padding there is neither a mask nor positions, which lets the attention back end take its fastest path.
    """
    inputs: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
    if batch.padded:
        inputs |= {"attention_mask": batch.attention_mask.long(), "position_ids": batch.positions}
    return inputs


def scored_logits(
    model: CausalLM,
    batch: Batch,
    taps: Iterable[Tap] = (),
    recompute: bool = False,
    scored: Int[Tensor, "row scored"] | None = None,
    changes: Iterable[tuple[nn.Module, CallFunction]] = (),
    whole: bool = False,
) -> Float[Tensor, "row scored vocabulary"]:
    """Next-token logits at each row's scored positions, with taps attached for this run.

    Only those positions pass through the unembedding, which in a small model is the largest matrix. The last block's
    attention projection and MLP run from the first scored column on, unless something else attached to the model may
    read their outputs at earlier columns.

    Args:
        model: frozen causal language model.
        batch: prompts on the model's device.
        taps: functions that read or replace tensors of modules; see `models.hooks`.
        recompute: activation checkpointing of each block: less memory, more time, the same result.
        scored: the scored columns if rows join during the run, see `prefix_logits`; by default the batch's.
        changes: modules, each with a function that changes the arguments of its calls before the taps act.
        whole: run the last block at every column, because a tap reads its outputs there.
    """
    columns = batch.scored if scored is None else scored
    rows = torch.arange(len(columns), device=columns.device).unsqueeze(1)
    parts = find_parts(model)
    attached_taps = [*taps, Tap(parts.unembedding, "input", lambda residual: residual[rows, columns])]
    attached = recomputed(parts.blocks, attached_taps) if recompute else tapped(attached_taps)
    trimmed = [] if whole or recompute or _is_observed(model, parts) else _last_parts(parts, attached_taps)
    inputs = model_inputs(batch)
    if getattr(model.config, "output_router_logits", False):
        inputs["output_router_logits"] = False  # the router loss expects every token in the last block
    # Rows join before anything else acts on the arguments of a call.
    with changed_calls(changes), as_written(model), trimmed_to(trimmed, batch.scored_from), attached:
        logits: Tensor = model(**inputs).logits
    return logits


def _is_observed(model: CausalLM, parts: Parts) -> bool:
    """True if something is attached to a module that receives or computes the output of the last block."""
    names = parts.family.blocks.split(".")[:-1]
    around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    modules = [*around, *parts.blocks[-1].modules(), parts.final_norm, parts.unembedding]
    return any(
        foreign_hooks([*module._forward_pre_hooks.values(), *module._forward_hooks.values()], known=())
        or replaced_forward(module)
        for module in modules
    )


def _last_parts(parts: Parts, taps: Iterable[Tap]) -> list[nn.Module]:
    """Token-wise modules of the last block with no tap on any module inside them."""
    body, block, acting = parts.family.mlp_body, parts.blocks[-1], {tap.module for tap in taps}
    candidates = [parts.attention_outputs[-1], *([block.get_submodule(body)] if body else [])]
    return [module for module in candidates if not acting & ({*module.modules()} - {module})]


def trimmed_to(modules: Iterable[nn.Module], first: int) -> AbstractContextManager[None]:
    """Within the context, run token-wise modules from column `first` on only; earlier columns of the output are 0."""

    def trimmed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(hidden[:, first:].contiguous(), *args, **kwargs)
            if isinstance(output, tuple):
                return F.pad(output[0], (0, 0, first, 0)), *output[1:]
            return F.pad(output, (0, 0, first, 0))

        return run

    return replaced_forwards((module, trimmed(module.forward)) for module in (modules if first else ()))


@contextmanager
def as_written(model: CausalLM) -> Iterator[None]:
    """Run a model's uncompiled code, in which hooks act, with finite attention masks.

    Hugging Face's eager attention masks columns by adding the lowest number of the model's dtype, and takes the
    softmax in float32, where the lowest number of float64 is minus infinity: a fully masked row, as at padding,
    becomes NaN, and in the next layer so does every token that gives it weight 0 (0 * NaN). The lowest number of
    float32 masks columns just as well; other dtypes have no lower number and are left alone.
    """
    lowest = torch.finfo(torch.float32).min

    def raised(mask: Tensor) -> Tensor | None:
        return mask.clamp(min=lowest) if mask.is_floating_point() else None

    blocks = find_parts(model).blocks if torch.finfo(model.dtype).min < lowest else ()
    with uncompiled(model), changed_argument(blocks, "attention_mask", raised):
        yield
