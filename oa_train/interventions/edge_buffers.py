"""Where the fast engine for edges keeps what is written, and the products of matrices that mix it for readers.

What sources write stands in one tensor [source, row, position, d_model], less their replacements. What is read
whatever the mask adds up beside it: replacements, and biases of attention outputs. So

    input of a reader = sum over sources of mask * written + standing,

and (1 - mask) * replacement costs nothing. Gradients of what is written add up in a second tensor like the first.

Layers come in blocks. What was written before a block is mixed for all of its readers at once, because a product with
many readers goes over the memory once for all of them; what is written inside is added when a layer reads.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch

from oa_train.interventions.nodes import ABLATED_BELOW
from oa_train.interventions.workspace import Workspace
from oa_train.models.graph import Graph
from oa_train.shapes import Bool, Float, Int, Tensor

LAYERS_AT_ONCE = 3


@dataclass(frozen=True, eq=False)
class Plan:
    """What is the same for every mask in one block of layers.

    Readers stand in the order of the graph; those of the last block end with the logits.

    Attributes:
        layers: of the block.
        n_readers: in all.
        before: sources that write before its first layer reads.
        n_sources: sources that write before its end.
        edges: the block's, in the order of the graph.
        places: where they stand in [reader, source], flattened.
    """

    layers: range
    n_readers: int
    before: int
    n_sources: int
    edges: slice
    places: Int[Tensor, " edge"]


@cache
def plans(graph: Graph, layers_at_once: int, device: torch.device) -> tuple[Plan, ...]:
    """The blocks of a model, in order."""
    firsts = range(0, graph.n_layers, layers_at_once)
    return tuple(_plan(graph, range(first, min(first + layers_at_once, graph.n_layers)), device) for first in firsts)


def _plan(graph: Graph, layers: range, device: torch.device) -> Plan:
    first = layers.start * readers_in_layer(graph)
    end = layers.stop * readers_in_layer(graph) + (layers.stop == graph.n_layers)
    n_sources = written_before(graph, layers.stop)
    edges = slice(int(graph.first_edge[first]), int(graph.first_edge[end - 1] + graph.n_read[end - 1]))
    places = (graph.edge_readers[edges] - first) * n_sources + graph.edge_sources[edges]
    return Plan(layers, end - first, written_before(graph, layers.start), n_sources, edges, places.to(device))


def readers_in_layer(graph: Graph) -> int:
    """Those of attention and the MLP."""
    return graph.n_heads + 2 * graph.n_kv_heads + 1


def written_before(graph: Graph, layer: int) -> int:
    """How many sources write before a layer; they are the first ones."""
    return 1 + layer * (graph.n_heads + 1)


class Block:
    """The masks of one block of layers, and what its readers read.

    Attributes:
        plan: of the block.
        keep: masks; 0 where there is no edge.
        to_keep: gradients to them, right at the edges only.
        inputs: of the readers; in the backward pass replaced by the gradients to them, reader by reader. None while
            the block is not at work.
    """

    def __init__(self, plan: Plan, mask: Float[Tensor, "row edge"], dtype: torch.dtype) -> None:
        self.plan = plan
        self.keep: Float[Tensor, "row reader source"] = self._laid_out(mask[:, plan.edges].to(dtype))
        self.to_keep: Float[Tensor, "row reader source"] | None = None
        self.inputs: Float[Tensor, "reader row position d_model"] | None = None

    def _laid_out(self, of_edges: Float[Tensor, "row edge"]) -> Float[Tensor, "row reader source"]:
        laid = of_edges.new_zeros(len(of_edges), self.plan.n_readers * self.plan.n_sources)
        laid.index_copy_(1, self.plan.places, of_edges)
        return laid.view(len(of_edges), self.plan.n_readers, self.plan.n_sources)

    def cut(self, dtype: torch.dtype) -> Float[Tensor, "row reader source"]:
        """How much of the gradient to its source's replacement comes through each edge."""
        keep = self.keep.flatten(1).index_select(1, self.plan.places).to(dtype)
        return self._laid_out(torch.where(keep < ABLATED_BELOW, 1 - keep, 0.0))

    def gradient_of_mask(self) -> Float[Tensor, "row edge"]:
        """To the block's edges."""
        assert self.to_keep is not None
        return self.to_keep.flatten(1).index_select(1, self.plan.places)

    def read(self, readers: slice) -> Float[Tensor, "reader row position d_model"]:
        """A view of what some of them read, or of the gradients to it."""
        assert self.inputs is not None
        return self.inputs[readers]


@dataclass(frozen=True)
class Needs:
    """What a run is for.

    Attributes:
        mask: whether there are gradients to the mask.
        recompute: whether it is to mix again what readers read.
        constants: numbers of rows and of positions over which gradients to replacements are kept apart; None where
            there are none.
        centred: whether nobody sees the mean over dimensions of what is written, so that it is taken off.
        scaled: whether what is read whatever the mask carries gradients, through the scale of a norm after attention.
    """

    mask: bool
    recompute: bool
    constants: tuple[int, int] | None
    centred: bool
    scaled: bool

    @property
    def gradients(self) -> bool:
        """Whether a backward pass will come."""
        return self.mask or self.constants is not None

    @property
    def inputs(self) -> bool:
        """Whether what readers read is kept."""
        return self.gradients and not self.recompute


class Buffers:
    """What has been written in one run of a model, and what is read of it.

    Args:
        workspace: of the model.
        graph: of the model.
        mask: of each row.
        kept: tokens at which every reader reads the model's own residual stream.
        d_model: width of the residual stream.
        dtype: of everything here.
        needs: what the run is for.

    Attributes:
        standing: what is read whatever the mask, so far.
        standing_before: the same when each layer's attention read.
    """

    def __init__(
        self,
        workspace: Workspace,
        graph: Graph,
        mask: Float[Tensor, "row edge"],
        kept: Bool[Tensor, "row position"],
        d_model: int,
        dtype: torch.dtype,
        needs: Needs,
    ) -> None:
        self.graph, self.needs = graph, needs
        self.shape = (*kept.shape, d_model)
        self._workspace = workspace
        self._kept = kept.nonzero(as_tuple=True)
        self._kind = dtype, mask.device
        self._blocks = [Block(plan, mask, dtype) for plan in plans(graph, LAYERS_AT_ONCE, mask.device)]
        self._spent = False
        self.written: Float[Tensor, "source row position d_model"] = self._take("written", graph.n_sources)
        self._inputs: Float[Tensor, "reader row position d_model"] | None = None
        self._gradient: Float[Tensor, "source row position d_model"] | None = None
        self._to_constants: Float[Tensor, "source row_or_1 position_or_1 d_model"] | None = None
        self.standing: Float[Tensor, "row_or_1 position_or_1 d_model"] = self.written.new_zeros(1, 1, d_model)
        self.standing_before: dict[int, Tensor] = {}
        self.to_standing: Float[Tensor, "row position d_model"] | None = None

    def _take(self, name: str, n_entries: int) -> Float[Tensor, "entry row position d_model"]:
        return self._workspace.take(name, (n_entries, *self.shape), *self._kind)

    def lend(self, name: str, size: int) -> AbstractContextManager[Tensor]:
        """A flat tensor of any numbers, for the length of a context."""
        return self._workspace.lend(name, size, *self._kind)

    def cast(self, tensor: Tensor) -> Tensor:
        """To the data type of everything here."""
        return tensor.to(self.written.dtype)

    def centre(self, written: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """Take the mean off in place, where nobody sees it; this is its own transpose."""
        return written.sub_(written.mean(dim=-1, keepdim=True)) if self.needs.centred else written

    def block(self, layer: int) -> Block:
        """The block of a layer."""
        return next(block for block in self._blocks if layer in block.plan.layers)

    def readers(self, layer: int) -> slice:
        """Where a layer's readers stand in its block: those of attention, then the MLP."""
        n_readers = readers_in_layer(self.graph)
        first = (layer - self.block(layer).plan.layers.start) * n_readers
        return slice(first, first + n_readers)

    def open(self, block: Block) -> None:
        """Mix what was written before a block for all of its readers."""
        sizes, number = [one.plan.n_readers for one in self._blocks], self._blocks.index(block)
        if self._inputs is None:
            self._inputs = self._take("inputs", sum(sizes) if self.needs.inputs else max(sizes))
        if not self.needs.inputs:
            for other in self._blocks:
                other.inputs = None
        first = sum(sizes[:number]) if self.needs.inputs else 0
        block.inputs = self._inputs[first : first + sizes[number]]
        self.mix(block, slice(0, sizes[number]), slice(0, block.plan.before), first=True)

    def mix(self, block: Block, readers: slice, sources: slice, first: bool = False) -> None:
        """Add what sources have written to what readers read, or make it the first that they read."""
        if sources.start < sources.stop:
            _by_row(block.read(readers)).baddbmm_(
                block.keep[:, readers, sources], _by_row(self.written[sources]), beta=0 if first else 1
            )

    def complete(
        self, inputs: Float[Tensor, "reader row position d_model"], standing: Tensor, own: Tensor | None
    ) -> None:
        """Add what is read whatever the mask, and put the model's own stream at tokens that are never ablated."""
        inputs.add_(standing)
        if own is not None:
            rows, positions = self._kept
            inputs[:, rows, positions] = self.centre(self.cast(own[rows, positions]))

    def begin_backward(self) -> None:
        """Make room for gradients.

        Raises:
            RuntimeError: this is the second backward pass.
        """
        if self._spent:
            raise RuntimeError(
                "A second backward pass through one run of edge_logits: the first has overwritten what the readers "
                "read. Add the losses up before calling backward, run the model again, or take engine='stock'."
            )
        self._spent = True
        self._gradient = self._take("gradient", len(self.written))
        if self.needs.scaled:
            self.to_standing = self.written.new_zeros(self.shape)
        if self.needs.constants is not None:
            dtype = self.written.dtype
            if self.needs.constants[1] == 1:
                dtype = torch.promote_types(dtype, torch.float32)  # a sum over all tokens, and a small tensor
            shape = (len(self.written), *self.needs.constants, self.shape[-1])
            self._to_constants = self.written.new_zeros(shape, dtype=dtype)

    def take_apart(self, gradients: Float[Tensor, "reader row position d_model"]) -> None:
        """The other side of `complete`; what is read at tokens that are never ablated depends on nothing here."""
        rows, positions = self._kept
        gradients[:, rows, positions] = 0
        if self.to_standing is not None:
            self.to_standing += gradients.sum(dim=0)

    def unmix(self, block: Block, readers: slice, sources: slice, first: bool = False) -> None:
        """The other side of `mix`; gradients to what the readers read stand in its place.

        Args:
            block: of the readers.
            readers: in the block.
            sources: that they read.
            first: no other gradients have come to these sources before.
        """
        assert self._gradient is not None
        if sources.start < sources.stop:
            _by_row(self._gradient[sources]).baddbmm_(
                block.keep[:, readers, sources].transpose(1, 2), _by_row(block.read(readers)), beta=0 if first else 1
            )

    def close(self, block: Block) -> None:
        """The other side of `open`, when the gradients to what all readers of a block read are there."""
        plan, everyone = block.plan, slice(0, block.plan.n_readers)
        # The last block is the first whose gradients arrive.
        self.unmix(block, everyone, slice(0, plan.before), first=block is self._blocks[-1])
        gradients = block.read(everyone)
        if self.needs.mask:
            block.to_keep = _by_row(gradients) @ _by_row(self.written[: plan.n_sources]).transpose(1, 2)
        if self._to_constants is not None:
            _add_to_constants(self._to_constants[: plan.n_sources], block, gradients)
        block.inputs = None

    def gradient_of(self, sources: slice) -> Float[Tensor, "source row position d_model"]:
        """To what was written, when all who have read it are done."""
        assert self._gradient is not None
        return self.centre(self._gradient[sources])

    def gradient_of_constants(
        self, sources: slice, shape: torch.Size, scale: Tensor | None = None
    ) -> Float[Tensor, "source row_or_1 position_or_1 d_model"]:
        """To replacements, in the space of the residual stream, at the end of the backward pass.

        Args:
            sources: whose they are.
            shape: rows and positions of the replacements.
            scale: what they were multiplied with at each token.
        """
        assert self._to_constants is not None
        total = self.centre(self._to_constants[sources])
        if scale is not None:
            total = total * scale
        return total.sum_to_size(len(total), *shape, total.shape[-1])

    def gradient_of_mask(self) -> Float[Tensor, "row edge"] | None:
        """To all edges, at the end of the backward pass."""
        return torch.cat([block.gradient_of_mask() for block in self._blocks], dim=1) if self.needs.mask else None

    def end_forward(self) -> None:
        """Forget what no backward pass will need."""
        if not self.needs.gradients:
            self.free()
        elif self.needs.recompute:
            self._blocks[-1].inputs = None

    def free(self) -> None:
        """Give back all large tensors; nothing is read or written any more."""
        for name, tensor in (("written", self.written), ("inputs", self._inputs), ("gradient", self._gradient)):
            if tensor is not None:
                self._workspace.give(name, tensor)
        self._blocks = []
        del self.written, self._inputs, self._gradient, self._to_constants, self.to_standing


def _add_to_constants(
    total: Float[Tensor, "source row_or_1 position_or_1 d_model"],
    block: Block,
    gradients: Float[Tensor, "reader row position d_model"],
) -> None:
    cut = block.cut(total.dtype)
    if total.shape[2] == 1:
        gradients = gradients.sum(dim=2, keepdim=True, dtype=total.dtype)
    if total.shape[1] == 1:
        by_source = cut.permute(2, 1, 0).flatten(1)
        total.view(len(total), -1).addmm_(by_source, gradients.flatten(0, 1).flatten(1))
    else:
        _by_row(total).baddbmm_(cut.transpose(1, 2), _by_row(gradients))


def _by_row(tensor: Float[Tensor, "any row position d_model"]) -> Float[Tensor, "row any numbers"]:
    return tensor.flatten(2).transpose(0, 1)
