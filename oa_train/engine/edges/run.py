"""The engine for edges: every reader of the residual stream gets its own input.

A reader's input is the sum, over the sources that write before it, of mask * output + (1 - mask) * replacement, plus
the biases of the attention outputs, which belong to no head. The model's own residual stream is computed as well, but
read at protected tokens only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from oa_train.batches import Batch, TokenLayout
from oa_train.engine.edges.buffers import Buffers, Needs
from oa_train.engine.edges.operations import (
    Chain,
    ReadAttention,
    ReadLogits,
    ReadMLP,
    Write,
    WriteEmbedding,
    WriteHeads,
    WriteMLP,
)
from oa_train.engine.edges.workspace import workspace_of
from oa_train.engine.forward import scored_logits
from oa_train.engine.values import Values
from oa_train.errors import ConfigurationError
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.hooks import Tap, foreign_hooks, recomputed, replaced_forward, replaced_forwards, tapped
from oa_train.models.parts import Parts, find_parts
from oa_train.models.residual import ResidualParts, find_residual_parts, is_layer_norm, rms_norm_scale, weight_and_bias
from oa_train.models.sites import Site
from oa_train.shapes import Bool, Float, Int, Tensor


def run_edges(
    model: CausalLM,
    batch: Batch,
    graph: Graph,
    mask: Float[Tensor, "row edge"],
    values: Values,
    recompute: bool = False,
) -> Float[Tensor, "row scored vocabulary"]:
    """Logits at the scored positions under a mask of edges; see `masked_logits`.

    With `recompute` neither readers' inputs nor the MLPs' hidden layers are kept for the backward pass.

    Raises:
        ConfigurationError: foreign hooks are attached to a module that edges bypass.
        ModelError: an attention projection is not a plain linear map.
        RuntimeError: in a second backward pass through one run, which frees and overwrites what it needs.
    """
    scored = batch.scored[:, 0] if batch.scored.shape[1] == 1 else None
    with _Run(model, graph, mask, values, batch.protected, scored, recompute).attached():
        return scored_logits(model, batch, whole=True)


@contextmanager
def edges_called(
    model: CausalLM, graph: Graph, mask: Float[Tensor, "row edge"], values: Values, layout: TokenLayout
) -> Iterator[None]:
    """Mask the edges of one call of a model inside the context.

    Raises:
        ConfigurationError: see `run_edges`; also from the call itself, where it asks for hidden states.
        ModelError: see `run_edges`.
    """
    run = _Run(model, graph, mask, values, layout.protected)
    body = model.get_submodule(find_parts(model).family.blocks.rpartition(".")[0])
    with replaced_forwards([(body, _without_hidden_states(body))]), run.attached():
        yield


def edge_row_bytes(model: CausalLM, batch: Batch, gradients: bool) -> int:
    """Bytes of one row of a run: outputs of the sources, inputs of the readers and, if needed, their gradients."""
    graph = Graph.of(model.config)
    streams = graph.n_sources + graph.n_attention_readers + 1
    if gradients:
        streams = 2 * graph.n_sources + graph.n_readers
    return streams * batch.tokens.shape[1] * graph.d_model * model.dtype.itemsize


def _without_hidden_states(body: Any) -> Callable[..., Any]:
    """Forward of the module that runs the blocks, which refuses to return hidden states."""
    forward = body.forward

    @wraps(forward, updated=())  # leaves out torch.compile's attributes
    def checked(*args: Any, **kwargs: Any) -> Any:
        requested = kwargs.get("output_hidden_states")
        if body.config.output_hidden_states if requested is None else requested:
            raise ConfigurationError(
                "output_hidden_states is set in a call under a circuit of edges, where no layer has a hidden state: "
                "every reader has its own input, and the outputs of blocks are correct at protected tokens only. "
                "Call the model without it, or take a circuit of nodes (level: nodes)."
            )
        return forward(*args, **kwargs)

    return checked


def _check_hooks(parts: Parts, residual: ResidualParts) -> None:
    """Refuse foreign hooks on modules whose tensors are not used under a circuit of edges."""
    attached: dict[str, list[Any]] = {
        name: [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for name, module in residual.bypassed
    }
    output_path = parts.family.attention_output
    for layer, (readers, output) in enumerate(zip(residual.attention, parts.attention_outputs, strict=True)):
        for path, module in zip(parts.family.projections, readers.modules, strict=True):
            attached[f"the input of {path} of block {layer}"] = [*module._forward_pre_hooks.values()]
            attached[f"{path} of block {layer}"] = replaced_forward(module)
        attached[f"the output of {output_path} of block {layer}"] = [*output._forward_hooks.values()]
        attached[f"{output_path} of block {layer}"] = replaced_forward(output)
    for name, functions in attached.items():
        if foreign := foreign_hooks(functions):
            raise ConfigurationError(
                f"A function is attached to {name} ({foreign[0]}). It would have no effect, or a wrong one, in a "
                "circuit of edges: every reader has its own input there, and nothing uses this tensor. "
                "Remove it for the run, or take a circuit of nodes (level: nodes)."
            )


class _Run:
    """Routes a model's reads and writes of the residual stream through the edge operations.

    `scored` is the only column of each row whose logits are used; None if there are several.
    """

    def __init__(
        self,
        model: CausalLM,
        graph: Graph,
        mask: Float[Tensor, "row edge"],
        values: Values,
        protected: Bool[Tensor, "row position"],
        scored: Int[Tensor, " row"] | None = None,
        recompute: bool = False,
    ) -> None:
        self._parts, self._residual = find_parts(model), find_residual_parts(model)
        self._workspace, self._graph = workspace_of(model), graph
        self._mask, self._protected, self._recompute = mask, protected, recompute
        self._protected_tokens = protected.nonzero(as_tuple=True)
        self._constants = {site: values.at(site) for site in graph.sites}
        self._chain = Chain(mask.new_zeros(()))
        self._writes: list[Write] = []
        self._buffers: Buffers
        self._projected: tuple[Tensor, ...] = ()
        # Layer whose MLP runs at the scored token alone: the last one, unless its MLP shares a norm with attention.
        self._alone: int | None = None
        if scored is not None and self._parts.family.mlp_input != self._parts.family.attention_norm:
            self._alone = graph.n_layers - 1
            self._scored = torch.arange(len(scored), device=scored.device), scored
        _check_hooks(self._parts, self._residual)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Route the model's reads and writes through the operations inside the context."""
        again = self._residual.mlp_bodies if self._recompute else ()
        with recomputed(again), replaced_forwards(self._forwards()), tapped(self._taps()):
            yield

    def _forwards(self) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        """The attention projections, and the functions that replace them."""
        for readers, output in zip(self._residual.attention, self._parts.attention_outputs, strict=True):
            for index, module in enumerate(readers.modules):
                yield module, partial(self._projection, index)
            yield output, partial(self._output, output)

    def _taps(self) -> Iterator[Tap]:
        for layer, block in enumerate(self._parts.blocks):
            yield Tap(block, "input", partial(self._enter_block, layer))
            yield Tap(self._residual.mlp_inputs[layer], "input", partial(self._enter_mlp, layer))
            yield Tap(self._parts.attention_outputs[layer], "input", partial(self._write_heads, layer))
            yield Tap(self._parts.mlps[layer], "output", partial(self._write_mlp, layer))
        yield Tap(self._parts.final_norm, "input", self._enter_final_norm)

    def _by_row(self, hidden: Tensor) -> Float[Tensor, "row position any"]:
        # Some families put rows and positions into one dimension.
        return hidden.view(*self._protected.shape, -1)

    def _projection(self, index: int, hidden: Tensor) -> Tensor:
        return self._projected[index].view(*hidden.shape[:-1], -1)

    @torch.no_grad()
    def _output(self, projection: nn.Module, heads: Tensor) -> Tensor:
        """The attention output projection at protected tokens; its output at other tokens is not used."""
        weight, bias = weight_and_bias(projection)
        projected = F.linear(self._by_row(heads)[self._protected_tokens], weight, bias)
        everywhere = projected.new_zeros(*self._protected.shape, len(weight))
        everywhere[self._protected_tokens] = projected
        return everywhere.view(*heads.shape[:-1], -1)

    def _enter_block(self, layer: int, hidden: Tensor) -> Tensor:
        stream = self._by_row(hidden)
        if layer == 0:
            self._write_embedding(stream)
        reading = ReadAttention(self._buffers, layer, stream, self._residual.attention[layer])
        self._projected = self._chain.run(reading)
        # No gradient flows through the model's own residual stream.
        return hidden.detach()

    def _write_embedding(self, embedded: Float[Tensor, "row position d_model"]) -> None:
        device, constants = embedded.device.type, list(self._constants.values())
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embedded.dtype
        self._buffers = Buffers(
            self._workspace, self._graph, self._mask.detach(), self._protected, dtype, self._needs(constants)
        )
        self._chain.run(WriteEmbedding(self._buffers, constants[0], self._writes), embedded, self._mask, *constants)

    def _needs(self, constants: list[Tensor]) -> Needs:
        training, norm = torch.is_grad_enabled(), self._residual.attention[0].norm
        rows, positions = (max(tensor.shape[dim] for tensor in constants) for dim in (0, 1))
        if self._residual.post_norms:
            # A norm after attention scales replacements differently at each token.
            rows, positions = self._protected.shape
        return Needs(
            mask=training and self._mask.requires_grad,
            recompute=self._recompute,
            constants=(rows, positions) if training and any(tensor.requires_grad for tensor in constants) else None,
            centred=norm is not None and is_layer_norm(norm),
            scaled=bool(self._residual.post_norms),
        )

    def _write_heads(self, layer: int, heads: Tensor) -> None:
        values = self._by_row(heads).unflatten(-1, (self._graph.n_heads, -1))
        projection, scale = self._parts.attention_outputs[layer], list[Tensor]()
        if self._residual.post_norms:
            # A head writes its term of the attention output, multiplied by the scale that the norm has for their sum.
            total = F.linear(self._by_row(heads), *weight_and_bias(projection))
            scale = [rms_norm_scale(self._residual.post_norms[layer], total)]
        self._writes.append(WriteHeads(self._buffers, layer, self._constants[Site("heads", layer)], projection))
        self._chain.run(self._writes[-1], values, *scale)

    def _enter_mlp(self, layer: int, hidden: Tensor) -> Tensor:
        (read,) = self._chain.run(ReadMLP(self._buffers, layer, self._by_row(hidden)))
        if layer != self._alone:
            return read.view(hidden.shape)
        return read[self._scored].view(len(read), *[1] * (hidden.dim() - 2), -1)

    def _write_mlp(self, layer: int, output: Tensor) -> Tensor:
        if layer == self._alone:
            everywhere = output.new_zeros(*self._protected.shape, output.shape[-1])
            everywhere = everywhere.index_put(self._scored, output.flatten(0, -2))
            output = everywhere.flatten(0, 3 - output.dim())  # to as many dimensions as before
        self._writes.append(WriteMLP(self._buffers, layer, self._constants[Site("mlp", layer)]))
        self._chain.run(self._writes[-1], self._by_row(output))
        return output

    def _enter_final_norm(self, hidden: Tensor) -> Tensor:
        (read,) = self._chain.run(ReadLogits(self._buffers, self._by_row(hidden)))
        return read.view(hidden.shape)
