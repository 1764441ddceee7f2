"""Runs a model from a middle layer to its end, on single tokens, with the output of every attention layer supplied.

Only attention moves information between tokens. Once its output is supplied, each token's residual stream yields a
prediction independently of the surrounding text. The blocks run as Hugging Face wrote them: the model is called on
one-token sequences, its attention modules return the supplied outputs during that call, and each residual stream
joins the batch at its start layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from oa_train.batches import Batch
from oa_train.engine.forward import as_written, scored_logits
from oa_train.models.frozen import CausalLM
from oa_train.models.hooks import Tap, changed_calls, replaced_forwards, tapped
from oa_train.models.parts import find_parts
from oa_train.shapes import Float, Int, Tensor

# Maps a layer and the starts at or before it to the layer's attention outputs, [start or 1, token or 1, d_model].
AttentionOutputs = Callable[[int, Sequence[int]], Tensor]


@dataclass(frozen=True, eq=False)
class ScoredStream:
    """A clean run at the scored positions of its prompts, which are called tokens here.

    Attributes:
        logits: logits of the model.
        residuals: input of each block and, last, of the final norm.
        attention: what each attention layer adds to the residual stream; None if it was not asked for.
    """

    logits: Float[Tensor, "row scored vocabulary"]
    residuals: Float[Tensor, "place row scored d_model"]
    attention: Float[Tensor, "layer row scored d_model"] | None


@torch.no_grad()
def scored_stream(model: CausalLM, batch: Batch, attention: bool = False) -> ScoredStream:
    """Run a model; keep the residual stream and, if asked for, what attention adds at the scored positions."""
    parts, rows = find_parts(model), torch.arange(len(batch), device=batch.tokens.device).unsqueeze(1)
    streams: list[Tensor] = []
    added: list[Tensor] = []

    def keep(kept: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda tensor: kept.append(tensor.reshape(*batch.tokens.shape, -1)[rows, batch.scored])

    taps = [Tap(module, "input", keep(streams)) for module in (*parts.blocks, parts.final_norm)]
    if attention:
        taps += [Tap(module, "output", keep(added)) for module in parts.attentions]
    logits = scored_logits(model, batch, taps)
    return ScoredStream(logits, torch.stack(streams), torch.stack(added) if added else None)


def run_tail(
    model: CausalLM,
    residuals: Float[Tensor, "start token d_model"],
    starts: Sequence[int],
    attention: AttentionOutputs,
) -> Float[Tensor, "start token d_model"]:
    """Run the blocks from each start on, on single tokens, up to the final norm.

    Starts are indices of blocks, ascending; the number of layers stands for the final norm. The residuals are what
    enters there; gradients flow to them and to the outputs of attention.
    """
    n_tokens = residuals.shape[1]
    joined: dict[int, Tensor] = {start: residuals[number] for number, start in enumerate(starts)}
    final: list[Tensor] = []

    def running(layer: int) -> list[int]:
        return [start for start in starts if start <= layer]

    def join(layer: int) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        def change(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden, *others = args
            before = [] if layer == starts[0] or not running(layer) else [hidden]
            new = [joined[layer].unsqueeze(1)] if layer in joined else []
            return ((torch.cat([*before, *new]) if new else hidden), *others), kwargs

        return change

    def supplied(layer: int) -> Tensor:
        live = running(layer)
        values = attention(layer, live)
        return values.expand(len(live), n_tokens, -1).flatten(0, 1).unsqueeze(1)

    parts = find_parts(model)
    forwards = [forward for layer in range(starts[0], len(parts.blocks)) for forward in _swaps(model, layer, supplied)]
    forwards += [(block, _skip) for block in parts.blocks[: starts[0]]]
    changes = [(module, join(layer)) for layer, module in enumerate([*parts.blocks, parts.final_norm])]
    taps = [
        Tap(parts.final_norm, "input", lambda tensor: final.append(tensor)),
        Tap(parts.unembedding, "input", lambda tensor: tensor[:0]),
    ]
    with replaced_forwards(forwards), changed_calls(changes), tapped(taps):
        _call(model, n_tokens)
    by_start: Tensor = final[0].squeeze(1).unflatten(0, (len(starts), n_tokens))
    return by_start


def read_out(model: CausalLM, residuals: Float[Tensor, "token d_model"]) -> Float[Tensor, "token vocabulary"]:
    """Logits of residual streams at the final norm: the norm, the unembedding and, say, soft-capping are applied."""
    parts = find_parts(model)
    entering = Tap(parts.final_norm, "input", lambda _: residuals.unsqueeze(1))
    with replaced_forwards((block, _skip) for block in parts.blocks), tapped([entering]):
        logits: Tensor = _call(model, len(residuals)).squeeze(1)
    return logits


def _call(model: CausalLM, n_tokens: int) -> Float[Tensor, "row position vocabulary"]:
    """Call the model on one-token sequences whose residual streams are replaced during the run."""
    tokens: Int[Tensor, "token position"] = torch.zeros(n_tokens, 1, dtype=torch.long, device=model.device)
    with as_written(model):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _skip(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """Forward of a skipped block: returns its input."""
    return hidden


def _swaps(
    model: CausalLM, layer: int, supplied: Callable[[int], Tensor]
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Forward methods that make the attention of a block return the supplied output."""
    parts = find_parts(model)
    attention = parts.blocks[layer].get_submodule(parts.family.attention_output.split(".")[0])
    # Some attention modules add the residual stream themselves.
    adds = "residual" in signature(attention.forward).parameters

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        call = signature(type(attention).forward).bind(attention, *args, **kwargs).arguments
        hidden = call["hidden_states"]
        if parts.family.attention_post_norm:
            return hidden, None  # the value does not matter: the norm after it returns the supplied output
        values = supplied(layer).to(hidden.dtype)
        return (values + call["residual"] if adds else values.expand_as(hidden)), None

    yield attention, forward
    if parts.family.attention_post_norm:
        yield parts.attentions[layer], lambda hidden: supplied(layer).to(hidden.dtype).expand_as(hidden)
