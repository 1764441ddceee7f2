"""The reads and writes of one run of edges, with hand-written gradients.

Parts of the model write into `Buffers` and read from them, which autograd does not see. Each write and each read is
one `Operation`; a dummy tensor passed from one to the next makes autograd call them in reverse in the backward pass.

Layer norms ignore the mean over d_model, so in models that have them it is subtracted from everything that is written.
The readers' inputs then have mean zero, and layer norms reduce to RMS norms.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from oa_train.engine.edges.buffers import Buffers, written_before
from oa_train.models.residual import AttentionReaders, NormWeights, head_weights, weight_and_bias
from oa_train.shapes import Float, Tensor


class Operation(ABC):
    """A write or a read, with its backward pass."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers

    @abstractmethod
    def _forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Map the tensors that may need gradients to the results."""

    @abstractmethod
    def _backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Map the gradients of the results of `_forward` to those of its arguments."""


class Chain:
    """Links operations, so that autograd runs their backward passes in reverse order.

    `token`, the dummy tensor, is any scalar that is not a leaf with gradients.
    """

    def __init__(self, token: Tensor) -> None:
        self._token = token

    def run(self, operation: Operation, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the next operation."""
        self._token, *results = _Linked.apply(operation, self._token, *tensors)
        return tuple(results)


class _Linked(torch.autograd.Function):
    """An operation between one token and the next."""

    @staticmethod
    def forward(context: Any, operation: Operation, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        context.operation = operation
        with torch.autocast(token.device.type, enabled=False):
            return torch.zeros_like(token), *operation._forward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad_token: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad_token, *context.operation._backward(*gradients)


class Write(Operation):
    """The units of a site write to some entries of the buffers; `constants` are their replacements."""

    def __init__(
        self, buffers: Buffers, entries: slice, constants: Float[Tensor, "row_or_1 position_or_1 unit width"]
    ) -> None:
        super().__init__(buffers)
        self._entries, self._constants = entries, constants.detach()

    @abstractmethod
    def _gradient_of_constants(self) -> Float[Tensor, "row_or_1 position_or_1 unit width"]:
        """Gradient of the replacements, at the end of the backward pass."""


class WriteMLP(Write):
    """The MLP of a layer writes."""

    def __init__(self, buffers: Buffers, layer: int, constants: Tensor) -> None:
        end = written_before(buffers.graph, layer + 1)
        super().__init__(buffers, slice(end - 1, end), constants)

    def _forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        constant = self.buffers.cast(self._constants.squeeze(2))
        self.buffers.centre(torch.sub(tensors[0], constant, out=self.buffers.written[self._entries.start]))
        self.buffers.add_to_baseline(constant.clone())
        return ()

    def _backward(self, *_: Tensor) -> tuple[Tensor | None, ...]:
        # A copy: the buffer will hold another step's gradient.
        return (self.buffers.gradient_of(self._entries)[0].clone(),)

    def _gradient_of_constants(self) -> Float[Tensor, "row_or_1 position_or_1 1 d_model"]:
        return self.buffers.gradient_of_constants(self._entries, self._constants.shape[:2]).permute(1, 2, 0, 3)


class WriteEmbedding(WriteMLP):
    """The embedding writes, like an MLP before the first layer.

    This is the first operation, and its inputs are the mask and the replacements; so it is the last one in a backward
    pass, when `writes` holds all other writes of the run, in the order of the replacements.
    """

    def __init__(self, buffers: Buffers, constants: Tensor, writes: Sequence[Write]) -> None:
        super().__init__(buffers, -1, constants)
        self._writes = writes

    def _backward(self, *_: Tensor) -> tuple[Tensor | None, ...]:
        trained = self.buffers.needs.constants is not None
        grad_constants = [write._gradient_of_constants() if trained else None for write in (self, *self._writes)]
        gradients = *super()._backward(), self.buffers.gradient_of_mask(), *grad_constants
        self.buffers.free()
        return gradients


class WriteHeads(Write):
    """The heads of a layer write, through the attention output `projection`."""

    def __init__(self, buffers: Buffers, layer: int, constants: Tensor, projection: nn.Module) -> None:
        before = written_before(buffers.graph, layer)
        super().__init__(buffers, slice(before, before + buffers.graph.n_heads), constants)
        self._projection = projection
        self._scale: Float[Tensor, "row position d_model"] | None = None

    def _forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        values, *scale = tensors
        constants, weights = self.buffers.cast(self._constants), self._weights()
        difference = self.buffers.cast(values) - constants
        written = self.buffers.written[self._entries]
        torch.bmm(difference.flatten(0, 1).transpose(0, 1), weights, out=written.flatten(1, 2))
        baseline, bias = constants.flatten(2) @ weights.flatten(0, 1), weight_and_bias(self._projection)[1]
        if bias is not None:
            baseline = self.buffers.cast(baseline + bias)
        if scale:
            self._scale, self._unscaled = scale[0].detach(), (written.clone(), baseline)
            written.mul_(self._scale)
            baseline = self.buffers.cast(baseline * self._scale)
        self.buffers.centre(written)
        self.buffers.add_to_baseline(baseline)
        return ()

    def _weights(self) -> Float[Tensor, "head d_head d_model"]:
        return self.buffers.cast(head_weights(self._projection, self.buffers.graph.n_heads))

    def _backward(self, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weights = self.buffers.gradient_of(self._entries), self._weights()
        grad_scale: tuple[Tensor, ...] = ()
        if self._scale is not None:
            written, baseline = self._unscaled
            grad_scale = ((gradient * written).sum(dim=0) + self.buffers.gradient[0] * baseline,)
            gradient.mul_(self._scale)
            del self._unscaled
        grad_values = gradient.new_empty(*gradient.shape[1:3], *weights.shape[:2])
        torch.bmm(gradient.flatten(1, 2), weights.transpose(1, 2), out=grad_values.flatten(0, 1).transpose(0, 1))
        return grad_values, *grad_scale

    def _gradient_of_constants(self) -> Float[Tensor, "row_or_1 position_or_1 head d_head"]:
        shape = self._constants.shape[:2]
        grad_written = self.buffers.gradient_of_constants(self._entries, shape, self._scale)
        grad_values = grad_written.flatten(1, 2) @ self._weights().transpose(1, 2).to(grad_written.dtype)
        return grad_values.view(len(grad_values), *shape, -1).permute(1, 2, 0, 3)


class ReadAttention(Operation):
    """The queries, keys and values of a layer read and are projected; `stream` is the model's own residual stream."""

    def __init__(self, buffers: Buffers, layer: int, stream: Tensor, readers: AttentionReaders) -> None:
        super().__init__(buffers)
        self._layer, self._stream, self._readers = layer, stream.detach(), readers
        self._norm = None if readers.norm is None else NormWeights.of(readers.norm)

    def _inputs(self) -> Float[Tensor, "reader row position d_model"]:
        # Looked up each time: a reference kept here would live as long as the logits.
        layer = self.buffers.layers[self._layer]
        return layer.inputs[layer.plan.attention]

    def _forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        # This also mixes what earlier layers contribute to the inputs of the layer's MLP and, in the last, the logits.
        self.buffers.mix_before(self._layer, slice(0, self.buffers.layers[self._layer].plan.n_readers))
        inputs = self._inputs()
        self.buffers.restore_protected(inputs, self._stream)
        del self._stream
        return self._project(inputs.flatten(1, 2))

    def _project(self, inputs: Float[Tensor, "reader token d_model"]) -> tuple[Tensor, ...]:
        counts = self._readers.counts
        with self._weights() as weights:
            self._projected = inputs.new_empty(*inputs.shape[:2], weights[0].shape[1])
            parts = self._projected.split(counts)
            for part, read, weight in zip(parts, inputs.split(counts), weights, strict=True):
                torch.bmm(read, weight.transpose(1, 2), out=part)
        if self._norm is not None:
            # A norm divides each token by its length, which commutes with the projection.
            self._factor = self._norm.factor(inputs)
            self._projected.mul_(self._factor)
        outputs = tuple(self._bias(module) for module in self._readers.modules)
        views = self._readers.by_reader([output.flatten(0, 1).T for output in outputs])
        for view, part in zip(views, parts, strict=True):
            view.transpose(1, 2).add_(part)
        return outputs

    @contextmanager
    def _weights(self) -> Iterator[tuple[Tensor, ...]]:
        """Weights of queries, keys and values, [reader, d_head, d_model], times the gain of the norm."""
        if self._norm is None or self._norm.gain is None:
            yield tuple(self.buffers.cast(weight) for weight in self._readers.weights())
        else:
            # Computed each time, because weights may be sharded, or change.
            with self.buffers.lend("weights", self._readers.n_weights) as room:
                yield self._readers.weights_times(self._norm.gain, room)

    def _bias(self, module: nn.Module) -> Float[Tensor, "row position width"]:
        """Bias of a projection, plus the norm's bias after projection."""
        weight, bias = weight_and_bias(module)
        if self._norm is not None and self._norm.bias is not None:
            bias = F.linear(self._norm.bias, weight, bias)
        bias = weight.new_zeros(()) if bias is None else bias
        everywhere = self.buffers.cast(bias).expand(*self.buffers.shape[:2], len(weight))
        # A copy even if there is only one token, because products are added to it in place.
        return everywhere.clone(memory_format=torch.contiguous_format)

    def _backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = self._inputs()
        if self.buffers.needs.recompute:
            self.buffers.mix_before(self._layer, self.buffers.layers[self._layer].plan.attention)
        self._unproject(inputs.flatten(1, 2), gradients)
        self.buffers.release_protected(inputs)
        self.buffers.unmix_before(self._layer)
        return ()

    def _unproject(self, inputs: Float[Tensor, "reader token d_model"], gradients: tuple[Tensor, ...]) -> None:
        """Overwrite the inputs with their gradients."""
        by_reader = self._readers.by_reader([self.buffers.cast(gradient).flatten(0, 1).T for gradient in gradients])
        grad_projected = torch.cat([gradient.transpose(1, 2) for gradient in by_reader])
        if self._norm is None:
            inputs.zero_()
        else:
            # The gradient through the norm's factor: the output does not depend on the length of the input.
            along = (grad_projected * self._projected).sum(dim=-1, keepdim=True)
            inputs.mul_(along * self._factor.square() / -inputs.shape[-1])
            grad_projected.mul_(self._factor)
            del self._factor
        del self._projected
        counts = self._readers.counts
        with self._weights() as weights:
            for read, gradient, weight in zip(
                inputs.split(counts), grad_projected.split(counts), weights, strict=True
            ):
                read.baddbmm_(gradient, weight)


class ReadMLP(Operation):
    """The MLP of a layer reads the layer's heads; `ReadAttention` has mixed all that was written before them.

    `stream` is the model's own residual stream.
    """

    _first = False  # the first operation of the backward pass that writes gradients of the entries

    def __init__(self, buffers: Buffers, layer: int, stream: Tensor) -> None:
        super().__init__(buffers)
        graph, plan = buffers.graph, buffers.layers[layer].plan
        self._layer, self._stream = layer, stream.detach()
        self._reader = slice(plan.attention.stop, plan.attention.stop + 1)
        self._entries = slice(plan.before, plan.before + (0 if graph.parallel else graph.n_heads))
        self._baseline = buffers.baseline_before[layer] if graph.parallel else buffers.baseline

    def _inputs(self) -> Float[Tensor, "1 row position d_model"]:
        return self.buffers.layers[self._layer].inputs[self._reader]

    def _forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        self.buffers.mix(self._layer, self._reader, self._entries)
        inputs = self._inputs().add_(self._baseline)
        self.buffers.restore_protected(inputs, self._stream)
        read = inputs[0].to(self._stream.dtype, copy=True)
        del self._stream, self._baseline
        return (read,)

    def _backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = self._inputs().copy_(gradients[0])
        self.buffers.release_protected(inputs)
        self.buffers.unmix(self._layer, self._reader, self._entries, self._first)
        return ()


class ReadLogits(ReadMLP):
    """The logits read, like an MLP after the last layer; the last operation, and the first in a backward pass."""

    _first = True

    def __init__(self, buffers: Buffers, stream: Tensor) -> None:
        last = buffers.graph.n_layers - 1
        super().__init__(buffers, last, stream)
        plan, self._baseline = buffers.layers[last].plan, buffers.baseline
        self._reader, self._entries = slice(plan.n_readers - 1, plan.n_readers), slice(plan.before, plan.n_entries)

    def _forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        read = super()._forward()
        if not self.buffers.needs.gradients:
            self.buffers.free()
        return read

    def _backward(self, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        self.buffers.begin_backward()
        return super()._backward(*gradients)
