"""The fast engine for edge interventions: what `interventions.edges.StockStream` does, with hand-written gradients.

Parts of the model write into `Buffers` and read from them, which autograd does not see. Each write and each read is one
`_Operation`; a token that goes from one to the next lets autograd call them in reverse order in the backward pass.

Layer norms do not see the mean over dimensions, so where they are the model's norms it is taken off whatever is
written. What is read then has none, and layer norms become as simple as RMS norms.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from oa_train.ablations.base import SourceValues
from oa_train.interventions.edge_buffers import Buffers
from oa_train.interventions.stream import Stream
from oa_train.interventions.workspace import workspace_of
from oa_train.models.families import check_family, find_parts
from oa_train.models.graph import Graph
from oa_train.models.loading import CausalLM
from oa_train.models.norms import NormWeights, is_layer_norm
from oa_train.models.projections import AttentionReaders, attention_readers, head_weights, weight_and_bias
from oa_train.shapes import Bool, Float, Tensor


class KernelStream(Stream):
    """What has been written so far, mixed for its readers a block of layers at a time.

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
        self._workspace = workspace_of(model)
        self._graph = Graph.of(model.config)
        self._attention = attention_readers(model)
        self._outputs = find_parts(model).attention_outputs
        self._scaled = bool(check_family(model.config.model_type).attention_post_norm)
        norm = self._attention[0].norm
        self._centred = norm is not None and is_layer_norm(norm)
        self._mask, self._replacements, self._kept, self._recompute = mask, replacements, kept, recompute
        self._writes: list[_WriteHeads] = []
        self._token = mask.new_zeros(())
        self._buffers: Buffers

    def write_input(self, embedded: Tensor) -> None:  # noqa: D102
        leaves = (self._mask, *self._replacements.tensors())
        device = embedded.device.type
        self._buffers = Buffers(
            self._workspace,
            self._graph,
            self._mask.detach(),
            self._kept,
            d_model=embedded.shape[-1],
            dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embedded.dtype,
            saves=torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves),
            recompute=self._recompute,
            constants=self._shape_of_constants(),
            centred=self._centred,
        )
        self._apply(_Start(self._buffers, self._writes), self._mask, embedded, *leaves[1:])

    def _shape_of_constants(self) -> tuple[int, int] | None:
        tensors = self._replacements.tensors()
        if not any(one.requires_grad for one in tensors):
            return None
        if self._scaled:
            # What a replacement is multiplied with differs from token to token.
            return self._kept.shape[0], self._kept.shape[1]
        return max(one.shape[1] for one in tensors), max(one.shape[2] for one in tensors)

    def read_attention(self, layer: int, own: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return self._apply(_ReadAttention(self._buffers, layer, own, self._attention[layer]))

    def write_heads(self, layer: int, values: Tensor, scale: Tensor | None) -> None:  # noqa: D102
        constants = self._replacements.heads[layer].detach()
        self._writes.append(_WriteHeads(self._buffers, layer, self._outputs[layer], constants))
        self._apply(self._writes[-1], values, *([] if scale is None else [scale]))

    def read_mlp(self, layer: int, own: Tensor) -> Tensor:  # noqa: D102
        return self._apply(_ReadMLP(self._buffers, layer, own))[0]

    def write_mlp(self, layer: int, output: Tensor) -> None:  # noqa: D102
        constants = self._replacements.mlps[layer].detach()
        self._apply(_WriteMLP(self._buffers, layer, constants), output)

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
        self.slots = buffers.slots

    @abstractmethod
    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """From tensors that carry gradients to tensors that do."""

    @abstractmethod
    def backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """From gradients of what `forward` returned to gradients of what it was given."""


class _Start(_Operation):
    """The embedding writes; the first operation, and so in the backward pass the last one."""

    def __init__(self, buffers: Buffers, heads: "list[_WriteHeads]") -> None:
        super().__init__(buffers)
        self._writes = heads

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        _, embedded, inputs, heads, mlps = given
        self._shapes = inputs.shape[1:3], heads.shape[1:3], mlps.shape[1:3]
        constant = self.buffers.cast(inputs[0])
        self.buffers.write(slice(0, 1), embedded - constant)
        self.buffers.write(slice(1, 2), constant)
        return ()

    def backward(self, *_: Tensor) -> tuple[Tensor | None, ...]:
        to_embedded = self.buffers.gradient_of(slice(0, 1))[0].clone()
        to_mask, to_constants = self.buffers.gradient_of_mask(), self._to_constants()
        self.buffers.free()
        return to_mask, to_embedded, *to_constants

    def _to_constants(self) -> tuple[Tensor | None, ...]:
        if self.buffers.to_constants is None:
            return None, None, None
        of_inputs, of_heads, of_mlps = self._shapes
        layers = range(self.slots.graph.n_layers)
        return (
            self.buffers.gradient_of_constants([0], of_inputs),
            torch.stack([self._writes[layer].gradient_of_constants(of_heads) for layer in layers]),
            self.buffers.gradient_of_constants([self.slots.mlp(layer) for layer in layers], of_mlps),
        )


class _ReadAttention(_Operation):
    """Queries, keys and values of a layer read, and are projected."""

    def __init__(self, buffers: Buffers, layer: int, own: Tensor, readers: AttentionReaders) -> None:
        super().__init__(buffers)
        self._layer = layer
        self._own: Tensor | None = own.detach()
        self._readers = readers
        self._norm = None if readers.norm is None else NormWeights.of(readers.norm)
        self._block = buffers.block(layer)
        rows = buffers.readers(layer)
        # The MLP reads along with them what was written before the layer.
        self._and_mlp = rows
        self._rows = slice(rows.start, rows.stop - 1)
        self._slots = slice(self._block.plan.before, self.slots.before(layer))

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        if self._layer == self._block.plan.layers.start:
            self.buffers.open(self._block)
        self.buffers.mix(self._block, self._and_mlp, self._slots)
        inputs = self._block.inputs[self._rows]
        self.buffers.keep_own(inputs, self._own)
        self._own = None
        return self._project(inputs)

    def _project(self, inputs: Float[Tensor, "reader row position d_model"]) -> tuple[Tensor, ...]:
        by_reader = inputs.flatten(1, 2)
        weights = self._weights()
        projected = by_reader.new_empty(*by_reader.shape[:2], weights[0].shape[1])
        parts = projected.split(self._readers.counts)
        for part, one, weight in zip(parts, by_reader.split(self._readers.counts), weights, strict=True):
            torch.bmm(one, weight.transpose(1, 2), out=part)
        self._factor = None
        if self._norm is not None:
            self._factor = self._norm.factor(by_reader)
            projected.mul_(self._factor)
        self._projected = projected
        outputs = self._biases(by_reader)
        for view, part in zip(self._readers.by_reader([one.flatten(0, 1).T for one in outputs]), parts, strict=True):
            view.transpose(1, 2).add_(part)
        return outputs

    def _weights(self) -> tuple[Tensor, ...]:
        """[reader, d_head, d_model] for queries, keys and values, times the gain of the norm."""
        weights = [weight_and_bias(module)[0] for module in self._readers.modules]
        if self._norm is not None and self._norm.gain is not None:
            weights = [weight * self._norm.gain for weight in weights]
        return self._readers.by_reader([self.buffers.cast(weight) for weight in weights])

    def _biases(self, like: Tensor) -> tuple[Tensor, ...]:
        """[row, position, width] for each module, what it makes of the norm's bias."""
        made = []
        for module in self._readers.modules:
            weight, bias = weight_and_bias(module)
            if self._norm is not None and self._norm.bias is not None:
                bias = F.linear(self._norm.bias, weight, bias)
            shape = (*self.buffers.shape[:2], len(weight))
            made.append(like.new_zeros(shape) if bias is None else self.buffers.cast(bias).expand(shape).contiguous())
        return tuple(made)

    def backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if self._block.inputs is None:
            self.buffers.open(self._block)
        if not self.buffers.keeps_inputs:
            self.buffers.mix(self._block, self._rows, self._slots)
        inputs = self._block.inputs[self._rows]
        self._unproject(inputs.flatten(1, 2), gradients)
        self.buffers.drop_own(inputs)
        self.buffers.unmix(self._block, self._and_mlp, self._slots)
        if self._layer == self._block.plan.layers.start:
            self.buffers.close(self._block)
        return ()

    def _unproject(self, inputs: Float[Tensor, "reader token d_model"], gradients: tuple[Tensor, ...]) -> None:
        """Put the gradient to what was read in its place."""
        by_reader = self._readers.by_reader([one.flatten(0, 1).T for one in gradients])
        to_projected = torch.cat([one.transpose(1, 2) for one in by_reader])
        if self._factor is None:
            inputs.zero_()
        else:
            along = (to_projected * self._projected).sum(dim=-1, keepdim=True)
            inputs.mul_(along * self._factor.square() / -inputs.shape[-1])
            to_projected.mul_(self._factor)
        counts = self._readers.counts
        every = zip(inputs.split(counts), to_projected.split(counts), self._weights(), strict=True)
        for one, gradient, weight in every:
            one.baddbmm_(gradient, weight)
        self._projected = self._factor = None


class _ReadOne(_Operation):
    """A single reader reads."""

    _first = False  # in the backward pass, to add something to the gradients of the slots that it reads

    def __init__(self, buffers: Buffers, layer: int, own: Tensor, reader: int, slots: slice) -> None:
        super().__init__(buffers)
        self._block = buffers.block(layer)
        self._row = slice(reader, reader + 1)
        self._slots = slots
        self._own: Tensor | None = own.detach()

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        self.buffers.mix(self._block, self._row, self._slots)
        inputs = self._block.inputs[self._row]
        self.buffers.keep_own(inputs, self._own)
        made = inputs[0].to(self._own.dtype, copy=True)
        self._own = None
        return (made,)

    def backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if self._block.inputs is None:
            self.buffers.open(self._block)
        inputs = self._block.inputs[self._row]
        inputs.copy_(gradients[0])
        self.buffers.drop_own(inputs)
        self.buffers.unmix(self._block, self._row, self._slots, self._first)
        return ()


class _ReadMLP(_ReadOne):
    """The MLP of a layer reads its own layer's heads; what was written before, attention has mixed for it."""

    def __init__(self, buffers: Buffers, layer: int, own: Tensor) -> None:
        before = buffers.slots.before(layer)
        after = before if buffers.slots.graph.parallel else buffers.slots.mlp(layer)
        super().__init__(buffers, layer, own, buffers.readers(layer).stop - 1, slice(before, after))


class _ReadLast(_ReadOne):
    """The logits read; the last operation, and so in the backward pass the first one."""

    _first = True

    def __init__(self, buffers: Buffers, own: Tensor) -> None:
        last = buffers.slots.graph.n_layers - 1
        block = buffers.block(last)
        reader = len(block.plan.template) - 1
        super().__init__(buffers, last, own, reader, slice(block.plan.before, buffers.slots.before(last + 1)))

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        made = super().forward()
        self.buffers.end_forward()
        return made

    def backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        self.buffers.begin_backward()
        return super().backward(*gradients)


class _WriteHeads(_Operation):
    """The heads of a layer write."""

    def __init__(self, buffers: Buffers, layer: int, projection: nn.Module, constants: Tensor) -> None:
        super().__init__(buffers)
        self._projection = projection
        self._constants = constants
        heads = self.slots.heads(layer)
        self._heads, self._all = heads, slice(heads.start, heads.stop + 1)
        self._standing = slice(heads.stop, heads.stop + 1)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        values, *scale = given
        self._scale = scale[0] if scale else None
        constants = self.buffers.cast(self._constants)
        difference = self.buffers.cast(values) - constants
        weights = self._weights(values.shape[2])
        written = self.buffers.written[self._all]
        torch.bmm(difference.flatten(0, 1).transpose(0, 1), weights, out=written[:-1].flatten(1, 2))
        bias = weight_and_bias(self._projection)[1]
        standing = constants.flatten(2) @ weights.flatten(0, 1)
        written[-1] = standing if bias is None else standing + bias
        if self._scale is not None:
            self._unscaled = written.clone()
            written.mul_(self._scale)
        self.buffers.centre(written)
        return ()

    def _weights(self, n_heads: int) -> Float[Tensor, "head d_head d_model"]:
        return self.buffers.cast(head_weights(self._projection, n_heads))

    def backward(self, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient = self.buffers.gradient_of(self._all)
        n_heads = len(gradient) - 1
        weights = self._weights(n_heads).transpose(1, 2)
        to_scale: tuple[Tensor, ...] = ()
        if self._scale is not None:
            to_scale = ((gradient * self._unscaled).sum(dim=0),)
            gradient.mul_(self._scale)
        to_values = gradient.new_empty(*gradient.shape[1:3], n_heads, weights.shape[2])
        torch.bmm(gradient[:-1].flatten(1, 2), weights, out=to_values.flatten(0, 1).transpose(0, 1))
        return to_values, *to_scale

    def gradient_of_constants(self, shape: torch.Size) -> Float[Tensor, "row_or_1 position_or_1 head d_head"]:
        """To the replacements of the heads, at the very end."""
        heads = list(range(self._heads.start, self._heads.stop))
        to_written = self.buffers.gradient_of_constants(heads, shape, self._scale)
        weights = self._weights(len(heads)).transpose(1, 2)
        return (to_written.flatten(1, 2) @ weights).unflatten(1, shape).permute(1, 2, 0, 3)


class _WriteMLP(_Operation):
    """The MLP of a layer writes."""

    def __init__(self, buffers: Buffers, layer: int, constant: Tensor) -> None:
        super().__init__(buffers)
        self._constant = constant
        self._slot = slice(self.slots.mlp(layer), self.slots.mlp(layer) + 1)
        self._standing = self.slots.standing(layer)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        (output,) = given
        constant = self.buffers.cast(self._constant)
        self.buffers.write(self._slot, output - constant)
        self.buffers.written[self._standing] += self.buffers.centre(constant.clone())
        return ()

    def backward(self, *_: Tensor) -> tuple[Tensor | None, ...]:
        # A copy, because whoever looks at it later is not to find another step's.
        return (self.buffers.gradient_of(self._slot)[0].clone(),)
