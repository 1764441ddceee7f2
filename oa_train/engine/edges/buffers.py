"""Buffers for the outputs of the sources in one run of a model, and the matrix products that mix them for readers.

One tensor [entry, row, position, d_model] holds the output of each source minus its replacement. The first entry is
the baseline, which a reader receives whatever the mask: the replacements, and the biases of attention outputs. So

    input of a reader = sum over sources of mask * (value - replacement) + baseline

is one matrix product for all readers of a layer, and (1 - mask) * replacement costs nothing. Gradients of these
entries accumulate in a second tensor of the same shape.

Each layer's product reads everything that is written before it. One product for several layers would read it less
often, which does not help a CPU: with some dozens of readers it is compute-bound. A GPU is memory-bound there.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch

from oa_train.engine.edges.workspace import Workspace
from oa_train.engine.nodes import ABLATED_BELOW
from oa_train.models.graph import Graph
from oa_train.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """Layout of one layer's buffers for any mask; an entry is the baseline or a source.

    Attributes:
        n_readers: number of the layer's readers; in the graph's order: attention, MLP, in the last layer the logits.
        attention: slice of the readers that are queries, keys and values.
        before: number of entries that are written before attention reads.
        n_entries: number of entries that are written before the layer ends.
        edges: slice of the graph's edges that lead to these readers.
        places: index of each of these edges in a flattened table [reader, entry].
    """

    n_readers: int
    attention: slice
    before: int
    n_entries: int
    edges: slice
    places: Int[Tensor, " edge"]


@cache
def plans(graph: Graph, device: torch.device) -> tuple[Plan, ...]:
    """Plan of each layer of a model."""
    return tuple(_plan(graph, layer, device) for layer in range(graph.n_layers))


def _plan(graph: Graph, layer: int, device: torch.device) -> Plan:
    of_attention, n_entries = graph.n_attention_readers, written_before(graph, layer + 1)
    first = layer * (of_attention + 1)
    end = first + of_attention + 1 + (layer + 1 == graph.n_layers)
    edges = slice(int(graph.first_edge[first]), int(graph.first_edge[end - 1] + graph.n_read[end - 1]))
    places = (graph.edge_readers[edges] - first) * n_entries + 1 + graph.edge_sources[edges]
    before = written_before(graph, layer)
    return Plan(end - first, slice(0, of_attention), before, n_entries, edges, places.to(device))


def written_before(graph: Graph, layer: int) -> int:
    """Number of entries that are written before a layer, including the baseline."""
    return 1 + graph.sources_before(layer)


class Layer:
    """Masks and readers' inputs of one layer.

    Attributes:
        plan: layout of the layer.
        keep: masks; 0 where there is no edge, and 1 for the baseline of attention's readers.
        grad_keep: gradients of `keep`, valid at edges only.
        inputs: inputs of the readers; in the backward pass overwritten by their gradients, reader by reader.
    """

    def __init__(
        self, plan: Plan, mask: Float[Tensor, "row edge"], inputs: Float[Tensor, "reader row position d_model"]
    ) -> None:
        self.plan, self.inputs = plan, inputs
        self.keep: Float[Tensor, "row reader entry"] = self._laid_out(mask[:, plan.edges].to(inputs.dtype))
        self.keep[:, plan.attention, 0] = 1
        self.grad_keep: Float[Tensor, "row reader entry"]

    def _laid_out(self, of_edges: Float[Tensor, "row edge"]) -> Float[Tensor, "row reader entry"]:
        table = of_edges.new_zeros(len(of_edges), self.plan.n_readers * self.plan.n_entries)
        table.index_copy_(1, self.plan.places, of_edges)
        return table.view(len(of_edges), self.plan.n_readers, self.plan.n_entries)

    def cut(self, dtype: torch.dtype) -> Float[Tensor, "row reader entry"]:
        """Factor of each edge in the gradient of its source's replacement: 1 - mask if it is ablated, else 0."""
        keep = self.keep.flatten(1).index_select(1, self.plan.places).to(dtype)
        return self._laid_out(torch.where(keep < ABLATED_BELOW, 1 - keep, 0.0))

    def gradient_of_mask(self) -> Float[Tensor, "row edge"]:
        """Gradient of the mask of the layer's edges."""
        return self.grad_keep.flatten(1).index_select(1, self.plan.places)


@dataclass(frozen=True)
class Needs:
    """Gradients that a run needs, and how its readers' inputs are computed.

    Attributes:
        mask: True if the mask needs gradients.
        recompute: True if readers' inputs are mixed again in the backward pass instead of being kept.
        constants: rows and positions (1 for a sum over all) of the replacements' gradients; None if they need none.
        centred: True if the mean over d_model is subtracted from all that is written, because all readers ignore it.
        scaled: True if the baseline carries gradients, through the scale of a norm after attention.
    """

    mask: bool
    recompute: bool
    constants: tuple[int, int] | None
    centred: bool
    scaled: bool

    @property
    def gradients(self) -> bool:
        """True if a backward pass may follow."""
        return self.mask or self.constants is not None

    @property
    def inputs(self) -> bool:
        """True if readers' inputs are kept for the backward pass."""
        return self.gradients and not self.recompute


class Buffers:
    """Outputs of the sources in one run of a model, and the readers' inputs, which are mixed from them.

    At protected tokens every reader reads the model's own residual stream. All buffers are of one dtype.

    Attributes:
        layers: masks and inputs of each layer.
        inputs: inputs of the readers of all layers, or of the current layer if they are not kept.
        written: the baseline at the time of the last read by attention, followed by the output of each source.
        baseline: the baseline so far.
        baseline_before: the baseline at the time of each layer's read by attention.
        gradient: in the backward pass, the gradient of `written` (of the baseline only if it carries gradients).
    """

    def __init__(
        self,
        workspace: Workspace,
        graph: Graph,
        mask: Float[Tensor, "row edge"],
        protected: Bool[Tensor, "row position"],
        dtype: torch.dtype,
        needs: Needs,
    ) -> None:
        self.graph, self.needs = graph, needs
        self.shape = (*protected.shape, graph.d_model)
        self._workspace = workspace
        self._protected = protected.nonzero(as_tuple=True)
        self._kind = dtype, mask.device
        layers = plans(graph, mask.device)
        sizes = [plan.n_readers for plan in layers]
        self.inputs = self._take("inputs", sum(sizes) if needs.inputs else max(sizes))
        parts = self.inputs.split(sizes) if needs.inputs else [self.inputs[:size] for size in sizes]
        self.layers = [Layer(plan, mask, inputs) for plan, inputs in zip(layers, parts, strict=True)]
        self._spent = False
        self.written: Float[Tensor, "entry row position d_model"] = self._take("written", 1 + graph.n_sources)
        self.gradient: Float[Tensor, "entry row position d_model"]
        self._grad_constants: Float[Tensor, "entry row_or_1 position_or_1 d_model"]
        self.baseline: Float[Tensor, "row_or_1 position_or_1 d_model"] = self.written.new_zeros(1, 1, graph.d_model)
        self.baseline_before: dict[int, Tensor] = {}

    def _take(self, name: str, n_entries: int) -> Float[Tensor, "entry row position d_model"]:
        return self._workspace.take(name, (n_entries, *self.shape), *self._kind)

    def lend(self, name: str, size: int) -> AbstractContextManager[Tensor]:
        """Lend a flat uninitialised tensor for the duration of the context."""
        return self._workspace.lend(name, size, *self._kind)

    def cast(self, tensor: Tensor) -> Tensor:
        """Convert to the dtype of the buffers."""
        return tensor.to(self.written.dtype)

    def centre(self, written: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """Subtract the mean in place, if readers ignore it; the operation is its own transpose."""
        return written.sub_(written.mean(dim=-1, keepdim=True)) if self.needs.centred else written

    def add_to_baseline(self, added: Float[Tensor, "row_or_1 position_or_1 d_model"]) -> None:
        """Add to the baseline of all later reads; changes the argument in place."""
        self.baseline = self.baseline + self.centre(added)

    def mix_before(self, layer: int, readers: slice) -> None:
        """Mix all that was written before a layer for some of its readers."""
        self.written[0] = self.baseline_before.setdefault(layer, self.baseline)
        self.mix(layer, readers, slice(0, self.layers[layer].plan.before), first=True)

    def mix(self, layer: int, readers: slice, entries: slice, first: bool = False) -> None:
        """Add entries, times the mask, to the inputs of a layer's readers; with `first` they overwrite the inputs."""
        of_layer = self.layers[layer]
        _by_row(of_layer.inputs[readers]).baddbmm_(
            of_layer.keep[:, readers, entries], _by_row(self.written[entries]), beta=0 if first else 1
        )

    def restore_protected(
        self, inputs: Float[Tensor, "reader row position d_model"], stream: Float[Tensor, "row position d_model"]
    ) -> None:
        """Overwrite inputs at protected tokens with the model's own residual stream."""
        rows, positions = self._protected
        inputs[:, rows, positions] = self.centre(self.cast(stream[rows, positions]))

    def begin_backward(self) -> None:
        """Allocate the gradients; raises `RuntimeError` in a second backward pass."""
        if self._spent:
            raise RuntimeError(
                "A second backward pass through one run of edges: the first has overwritten the readers' inputs. "
                "Add the losses up before calling backward, or run the model again."
            )
        self._spent = True
        self.gradient = self._take("gradient", len(self.written))
        self.gradient[0] = 0
        if self.needs.constants is not None:
            dtype = self.written.dtype
            if self.needs.constants[1] == 1:
                dtype = torch.promote_types(dtype, torch.float32)  # a sum over all tokens, and a small tensor
            shape = (len(self.written), *self.needs.constants, self.shape[-1])
            self._grad_constants = self.written.new_zeros(shape, dtype=dtype)

    def release_protected(self, gradients: Float[Tensor, "reader row position d_model"]) -> None:
        """Transpose of `restore_protected` and of adding the baseline, for gradients of inputs."""
        rows, positions = self._protected
        gradients[:, rows, positions] = 0
        if self.needs.scaled:
            self.gradient[0] += gradients.sum(dim=0)

    def unmix(self, layer: int, readers: slice, entries: slice, first: bool = False) -> None:
        """Transpose of `mix`: add the gradients of a layer's inputs to those of the entries; `first` overwrites."""
        of_layer = self.layers[layer]
        keep, gradients = of_layer.keep[:, readers, entries], _by_row(of_layer.inputs[readers])
        _by_row(self.gradient[entries]).baddbmm_(keep.transpose(1, 2), gradients, beta=0 if first else 1)

    def unmix_before(self, layer: int) -> None:
        """Transpose of `mix_before`, once the gradients of the inputs of all readers of a layer have arrived."""
        of_layer = self.layers[layer]
        plan = of_layer.plan
        # The backward pass begins with the last layer.
        self.unmix(layer, slice(0, plan.n_readers), slice(1, plan.before), first=of_layer is self.layers[-1])
        if self.needs.mask:
            of_layer.grad_keep = _by_row(of_layer.inputs) @ _by_row(self.written[: plan.n_entries]).transpose(1, 2)
        if self.needs.constants is not None:
            _add_to_constants(self._grad_constants[: plan.n_entries], of_layer)

    def gradient_of(self, sources: slice) -> Float[Tensor, "source row position d_model"]:
        """Gradient of what sources wrote, once all their readers have contributed."""
        return self.centre(self.gradient[sources])

    def gradient_of_constants(
        self, sources: slice, shape: torch.Size, scale: Tensor | None = None
    ) -> Float[Tensor, "source row_or_1 position_or_1 d_model"]:
        """Gradient of replacements of this shape [row, position], in the space of the residual stream.

        `scale` is the factor by which they were multiplied at each token.
        """
        total = self.centre(self._grad_constants[sources])
        if scale is not None:
            total = total * scale
        return total.sum_to_size(len(total), *shape, total.shape[-1])

    def gradient_of_mask(self) -> Float[Tensor, "row edge"] | None:
        """Gradient of the mask of all edges, at the end of the backward pass."""
        return torch.cat([layer.gradient_of_mask() for layer in self.layers], dim=1) if self.needs.mask else None

    def free(self) -> None:
        """Return all large tensors to the workspace; the buffers cannot be used afterwards."""
        for name in ("written", "inputs", "gradient"):
            if name in vars(self):
                self._workspace.give(name, vars(self)[name])
        vars(self).clear()
        self._spent = True


def _add_to_constants(total: Float[Tensor, "entry row_or_1 position_or_1 d_model"], layer: Layer) -> None:
    cut, gradients = layer.cut(total.dtype), layer.inputs
    if total.shape[2] == 1:
        gradients = gradients.sum(dim=2, keepdim=True, dtype=total.dtype)
    if total.shape[1] == 1:
        by_source = cut.permute(2, 1, 0).flatten(1)
        total.view(len(total), -1).addmm_(by_source, gradients.flatten(0, 1).flatten(1))
    else:
        _by_row(total).baddbmm_(cut.transpose(1, 2), _by_row(gradients))


def _by_row(tensor: Float[Tensor, "any row position d_model"]) -> Float[Tensor, "row any numbers"]:
    return tensor.flatten(2).transpose(0, 1)
