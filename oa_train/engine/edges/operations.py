"""The fast engine for edge interventions: what `engine.edges.run.StockStream` does, with hand-written gradients.

Parts of the model write into `Buffers` and read from them, which autograd does not see. Each write and each read is
one `_Operation`; a token that goes from one to the next lets autograd call them in reverse order in the backward pass.

Layer norms do not see the mean over dimensions, so where they are the model's norms it is taken off whatever is
written. What is read then has none, and layer norms become as simple as RMS norms.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from oa_train.ablations.base import SourceValues
from oa_train.engine.edges.buffers import Buffers, Layer, Needs, written_before
from oa_train.engine.edges.stream import Stream
from oa_train.engine.edges.workspace import workspace_of
from oa_train.models.families import check_family, find_parts
from oa_train.models.graph import Graph
from oa_train.models.loading import CausalLM
from oa_train.models.norms import NormWeights, is_layer_norm
from oa_train.models.projections import AttentionReaders, attention_readers, head_weights, weight_and_bias
from oa_train.shapes import Bool, Float, Tensor


class KernelStream(Stream):
    """What has been written so far, mixed for its readers a layer at a time.

    Args:
        model: that runs.
        mask: of each row.
        replacements: of the sources.
        kept: tokens at which every reader reads the model's own residual stream.
        recompute: see `edge_logits`.
    """

    def __init__(
        self,
        model: CausalLM,
        mask: Float[Tensor, "row edge"],
        replacements: SourceValues,
        kept: Bool[Tensor, "row position"],
        recompute: bool,
    ) -> None:
        self._workspace, self._graph = workspace_of(model), Graph.of(model.config)
        self._attention, self._outputs = attention_readers(model), find_parts(model).attention_outputs
        self._scaled = bool(check_family(model.config.model_type).attention_post_norm)
        self._mask, self._replacements, self._kept, self._recompute = mask, replacements, kept, recompute
        self._writes: list[_WriteHeads] = []
        self._token = mask.new_zeros(())
        self._buffers: Buffers

    def write_input(self, embedded: Tensor) -> None:  # noqa: D102
        device = embedded.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embedded.dtype
        self._buffers = Buffers(
            self._workspace, self._graph, self._mask.detach(), self._kept, embedded.shape[-1], dtype, self._needs()
        )
        self._apply(_Start(self._buffers, self._writes), embedded, self._mask, *self._replacements.tensors())

    def _needs(self) -> Needs:
        constants, norm = self._replacements.tensors(), self._attention[0].norm
        of_constants = torch.is_grad_enabled() and any(one.requires_grad for one in constants)
        shape = max(one.shape[1] for one in constants), max(one.shape[2] for one in constants)
        return Needs(
            mask=torch.is_grad_enabled() and self._mask.requires_grad,
            recompute=self._recompute,
            # A norm multiplies replacements with another scale at each token.
            constants=((self._kept.shape[0], self._kept.shape[1]) if self._scaled else shape)
            if of_constants
            else None,
            centred=norm is not None and is_layer_norm(norm),
            scaled=self._scaled,
        )

    def read_attention(self, layer: int, own: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return self._apply(_ReadAttention(self._buffers, layer, own, self._attention[layer]))

    def write_heads(self, layer: int, values: Tensor, scale: Tensor | None) -> None:  # noqa: D102
        constants = self._replacements.heads[layer].detach()
        self._writes.append(_WriteHeads(self._buffers, layer, self._outputs[layer], constants))
        self._apply(self._writes[-1], values, *([] if scale is None else [scale]))

    def read_mlp(self, layer: int, own: Tensor) -> Tensor:  # noqa: D102
        return self._apply(_ReadMLP(self._buffers, layer, own))[0]

    def write_mlp(self, layer: int, output: Tensor) -> None:  # noqa: D102
        self._apply(_WriteMLP(self._buffers, layer, self._replacements.mlps[layer].detach()), output)

    def read_last(self, own: Tensor) -> Tensor:  # noqa: D102
        return self._apply(_ReadLast(self._buffers, own))[0]

    def _apply(self, operation: "_Operation", *given: Tensor) -> tuple[Tensor, ...]:
        self._token, *made = _Chained.apply(operation, self._token, *given)
        return tuple(made)


class _Chained(torch.autograd.Function):
    """An operation between one token and the next."""

    @staticmethod
    def forward(context: Any, operation: "_Operation", token: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        context.operation = operation
        with torch.autocast(token.device.type, enabled=False):
            return torch.zeros_like(token), *operation.forward(*given)

    @staticmethod
    @once_differentiable
    def backward(context: Any, to_token: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, to_token, *context.operation.backward(*gradients)


class _Operation(ABC):
    """A write or a read, and its other side in the backward pass."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers

    @abstractmethod
    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """From tensors that may carry gradients to tensors that do."""

    @abstractmethod
    def backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """From gradients of what `forward` returned to gradients of what it was given."""


class _Start(_Operation):
    """The embedding writes; the first operation, and so in the backward pass the last one.

    Args:
        buffers: of the run.
        writes: where the heads' operations are to be found in the end.
    """

    def __init__(self, buffers: Buffers, writes: "list[_WriteHeads]") -> None:
        super().__init__(buffers)
        self._writes = writes

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        embedded, _, *constants = given
        self._shapes = [one.shape[1:3] for one in constants]
        constant = self.buffers.cast(constants[0][0])
        self.buffers.centre(torch.sub(embedded, constant, out=self.buffers.written[1]))
        self.buffers.standing = self.buffers.centre(constant.clone())
        return ()

    def backward(self, *_: Tensor) -> tuple[Tensor | None, ...]:
        to_embedded = self.buffers.gradient_of(slice(1, 2))[0].clone()
        to_mask, to_constants = self.buffers.gradient_of_mask(), self._to_constants()
        self.buffers.free()
        return to_embedded, to_mask, *to_constants

    def _to_constants(self) -> tuple[Tensor | None, ...]:
        if self.buffers.needs.constants is None:
            return None, None, None
        of_inputs, of_heads, of_mlps = self._shapes
        first_mlp, step = written_before(self.buffers.graph, 1) - 1, self.buffers.graph.n_heads + 1
        return (
            self.buffers.gradient_of_constants(slice(1, 2), of_inputs),
            torch.stack([write.gradient_of_constants(of_heads) for write in self._writes]),
            self.buffers.gradient_of_constants(slice(first_mlp, None, step), of_mlps),
        )


class _ReadAttention(_Operation):
    """Queries, keys and values of a layer read, and are projected.

    Args:
        buffers: of the run.
        layer: of the block.
        own: the model's own residual stream.
        readers: of the layer.
    """

    def __init__(self, buffers: Buffers, layer: int, own: Tensor, readers: AttentionReaders) -> None:
        super().__init__(buffers)
        self._layer, self._own, self._readers = layer, own.detach(), readers
        self._norm = None if readers.norm is None else NormWeights.of(readers.norm)

    @property
    def _at(self) -> Layer:
        # Looked up: what is kept here would live as long as the logits.
        return self.buffers.layers[self._layer]

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        # The MLP, and the logits, read along what was written before the layer.
        self.buffers.open(self._layer, slice(0, self._at.plan.n_readers))
        inputs = self._at.inputs[self._at.plan.attention]
        self.buffers.keep_own(inputs, self._own)
        del self._own
        return self._project(inputs.flatten(1, 2))

    def _project(self, inputs: Float[Tensor, "reader token d_model"]) -> tuple[Tensor, ...]:
        counts = self._readers.counts
        with self._weights() as weights:
            self._projected = inputs.new_empty(*inputs.shape[:2], weights[0].shape[1])
            parts = self._projected.split(counts)
            for part, read, weight in zip(parts, inputs.split(counts), weights, strict=True):
                torch.bmm(read, weight.transpose(1, 2), out=part)
        if self._norm is not None:
            # A norm divides each token by its length, which may be done after the projection as well.
            self._factor = self._norm.factor(inputs)
            self._projected.mul_(self._factor)
        outputs = self._biases()
        for view, part in zip(self._readers.by_reader([one.flatten(0, 1).T for one in outputs]), parts, strict=True):
            view.transpose(1, 2).add_(part)
        return outputs

    @contextmanager
    def _weights(self) -> Iterator[tuple[Tensor, ...]]:
        """Of queries, keys and values, [reader, d_head, d_model], times the gain of the norm."""
        if self._norm is None or self._norm.gain is None:
            yield tuple(self.buffers.cast(weight) for weight in self._readers.weights())
        else:
            # Made anew each time: whoever holds the weights may share them out between processes, or change them.
            with self.buffers.lend("weights", self._readers.n_weights) as room:
                yield self._readers.weights_times(self._norm.gain, room)

    def _biases(self) -> tuple[Float[Tensor, "row position width"], ...]:
        """What each module adds, and makes of the norm's bias."""
        made = []
        for module in self._readers.modules:
            weight, bias = weight_and_bias(module)
            if self._norm is not None and self._norm.bias is not None:
                bias = F.linear(self._norm.bias, weight, bias)
            bias = weight.new_zeros(()) if bias is None else bias
            everywhere = self.buffers.cast(bias).expand(*self.buffers.shape[:2], len(weight))
            # A copy also where one token has the bias as it is: products are added to it.
            made.append(everywhere.clone(memory_format=torch.contiguous_format))
        return tuple(made)

    def backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = self._at.inputs[self._at.plan.attention]
        if self.buffers.needs.recompute:
            self.buffers.open(self._layer, self._at.plan.attention)
        self._unproject(inputs.flatten(1, 2), gradients)
        self.buffers.take_apart(inputs)
        self.buffers.close(self._layer)
        return ()

    def _unproject(self, inputs: Float[Tensor, "reader token d_model"], gradients: tuple[Tensor, ...]) -> None:
        """Put the gradients to what was read in its place."""
        by_reader = self._readers.by_reader([self.buffers.cast(one).flatten(0, 1).T for one in gradients])
        to_projected = torch.cat([one.transpose(1, 2) for one in by_reader])
        if self._norm is None:
            inputs.zero_()
        else:
            # What the projection gains with the length of a token, the norm takes back.
            along = (to_projected * self._projected).sum(dim=-1, keepdim=True)
            inputs.mul_(along * self._factor.square() / -inputs.shape[-1])
            to_projected.mul_(self._factor)
            del self._factor
        del self._projected
        counts = self._readers.counts
        with self._weights() as weights:
            for read, gradient, weight in zip(inputs.split(counts), to_projected.split(counts), weights, strict=True):
                read.baddbmm_(gradient, weight)


class _ReadOne(_Operation):
    """A single reader reads.

    Args:
        buffers: of the run.
        layer: it is in.
        own: the model's own residual stream.
        reader: in the layer.
        entries: that have not been mixed for it yet.
    """

    _first = False  # in the backward pass, to bring gradients to these sources

    def __init__(self, buffers: Buffers, layer: int, own: Tensor, reader: int, entries: slice) -> None:
        super().__init__(buffers)
        self._layer, self._own = layer, own.detach()
        self._row, self._entries = slice(reader, reader + 1), entries

    def _inputs(self) -> Float[Tensor, "1 row position d_model"]:
        return self.buffers.layers[self._layer].inputs[self._row]

    def _standing(self) -> Tensor:
        return self.buffers.standing

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        self.buffers.mix(self._layer, self._row, self._entries)
        inputs = self._inputs().add_(self._standing())
        self.buffers.keep_own(inputs, self._own)
        made = inputs[0].to(self._own.dtype, copy=True)
        del self._own
        return (made,)

    def backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = self._inputs().copy_(gradients[0])
        self.buffers.take_apart(inputs)
        self.buffers.unmix(self._layer, self._row, self._entries, self._first)
        return ()


class _ReadMLP(_ReadOne):
    """The MLP of a layer reads the layer's heads; what was written before, attention has mixed for it."""

    def __init__(self, buffers: Buffers, layer: int, own: Tensor) -> None:
        before = written_before(buffers.graph, layer)
        n_heads = 0 if buffers.graph.parallel else buffers.graph.n_heads
        reader = buffers.layers[layer].plan.attention.stop
        super().__init__(buffers, layer, own, reader, slice(before, before + n_heads))

    def _standing(self) -> Tensor:
        return self.buffers.standing_before[self._layer] if self.buffers.graph.parallel else self.buffers.standing


class _ReadLast(_ReadOne):
    """The logits read; the last operation, and so in the backward pass the first one."""

    _first = True

    def __init__(self, buffers: Buffers, own: Tensor) -> None:
        last = buffers.graph.n_layers - 1
        plan = buffers.layers[last].plan
        super().__init__(buffers, last, own, plan.n_readers - 1, slice(plan.before, plan.n_entries))

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        made = super().forward()
        self.buffers.end_forward()
        return made

    def backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        self.buffers.begin_backward()
        return super().backward(*gradients)


class _WriteHeads(_Operation):
    """The heads of a layer write.

    Args:
        buffers: of the run.
        layer: of the block.
        projection: of the attention output.
        constants: replacements of the heads.
    """

    def __init__(
        self,
        buffers: Buffers,
        layer: int,
        projection: nn.Module,
        constants: Float[Tensor, "row_or_1 position_or_1 head d_head"],
    ) -> None:
        super().__init__(buffers)
        before, self._n_heads = written_before(buffers.graph, layer), buffers.graph.n_heads
        self._heads = slice(before, before + self._n_heads)
        self._projection, self._constants = projection, constants
        self._scale: Float[Tensor, "row position d_model"] | None = None

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        values, *scale = given
        constants, weights = self.buffers.cast(self._constants), self._weights()
        difference = self.buffers.cast(values) - constants
        written = self.buffers.written[self._heads]
        torch.bmm(difference.flatten(0, 1).transpose(0, 1), weights, out=written.flatten(1, 2))
        standing, bias = constants.flatten(2) @ weights.flatten(0, 1), weight_and_bias(self._projection)[1]
        if bias is not None:
            standing = self.buffers.cast(standing + bias)
        if scale:
            self._scale, self._unscaled = scale[0].detach(), (written.clone(), standing)
            written.mul_(self._scale)
            standing = self.buffers.cast(standing * self._scale)
        self.buffers.centre(written)
        self.buffers.standing = self.buffers.standing + self.buffers.centre(standing)
        return ()

    def _weights(self) -> Float[Tensor, "head d_head d_model"]:
        return self.buffers.cast(head_weights(self._projection, self._n_heads))

    def backward(self, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weights = self.buffers.gradient_of(self._heads), self._weights()
        to_scale: tuple[Tensor, ...] = ()
        if self._scale is not None:
            written, standing = self._unscaled
            to_scale = ((gradient * written).sum(dim=0) + self.buffers.gradient_to_standing() * standing,)
            gradient.mul_(self._scale)
            del self._unscaled
        to_values = gradient.new_empty(*gradient.shape[1:3], *weights.shape[:2])
        torch.bmm(gradient.flatten(1, 2), weights.transpose(1, 2), out=to_values.flatten(0, 1).transpose(0, 1))
        return to_values, *to_scale

    def gradient_of_constants(self, shape: torch.Size) -> Float[Tensor, "row_or_1 position_or_1 head d_head"]:
        """To the replacements of the heads, at the end of the backward pass."""
        to_written = self.buffers.gradient_of_constants(self._heads, shape, self._scale)
        to_values = to_written.flatten(1, 2) @ self._weights().transpose(1, 2).to(to_written.dtype)
        return to_values.view(self._n_heads, *shape, -1).permute(1, 2, 0, 3)


class _WriteMLP(_Operation):
    """The MLP of a layer writes.

    Args:
        buffers: of the run.
        layer: of the block.
        constant: replacement of the MLP.
    """

    def __init__(
        self, buffers: Buffers, layer: int, constant: Float[Tensor, "row_or_1 position_or_1 d_model"]
    ) -> None:
        super().__init__(buffers)
        self._number = written_before(buffers.graph, layer + 1) - 1
        self._constant = constant

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        constant = self.buffers.cast(self._constant)
        self.buffers.centre(torch.sub(given[0], constant, out=self.buffers.written[self._number]))
        self.buffers.standing = self.buffers.standing + self.buffers.centre(constant.clone())
        return ()

    def backward(self, *_: Tensor) -> tuple[Tensor | None, ...]:
        # A copy, because whoever looks at it later is not to find another step's.
        return (self.buffers.gradient_of(slice(self._number, self._number + 1))[0].clone(),)
