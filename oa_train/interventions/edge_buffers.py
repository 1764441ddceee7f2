"""Where the fast engine for edges keeps what is written, and the products of matrices that mix it for readers.

Everything that is written stands in one tensor [slot, row, position, d_model]. A source has a slot, in the order of the
graph, and there stands what it writes minus its replacement. After the embedding, and after the heads of each layer,
comes one more slot with what is read whatever the mask: replacements, and the bias of the attention output. So

    input of a reader = sum over slots of keep * slot,    keep = mask, or 1 for the further slots,

and (1 - mask) * replacement costs nothing. Gradients of what is written add up in a second tensor like it.

Layers come in blocks. What was written before a block is mixed for all of its readers at once, because a product with
many readers goes over the memory once for all of them; what is written inside is added when a layer reads.
"""

from dataclasses import dataclass
from functools import cache

import torch

from oa_train.interventions.nodes import ABLATED_BELOW
from oa_train.interventions.workspace import Workspace
from oa_train.models.graph import Graph
from oa_train.shapes import Bool, Float, Int, Tensor

LAYERS_AT_ONCE = 3


@dataclass(frozen=True)
class Slots:
    """Numbers of slots: embedding, its replacement; for each layer its heads, what stands beside them, its MLP.

    Attributes:
        graph: of the model.
    """

    graph: Graph

    def before(self, layer: int) -> int:
        """How many slots are written before a layer reads; they are the first ones."""
        return 2 + layer * (self.graph.n_heads + 2)

    def heads(self, layer: int) -> slice:
        """Of a layer's heads."""
        return slice(self.before(layer), self.before(layer) + self.graph.n_heads)

    def standing(self, layer: int) -> int:
        """What is read by all who read the layer's heads, or, in the end, by later layers."""
        return self.before(layer) + self.graph.n_heads

    def mlp(self, layer: int) -> int:
        """Of a layer's MLP."""
        return self.standing(layer) + 1

    def of_sources(self) -> Int[Tensor, " source"]:
        """Slot of every source."""
        layers = range(self.graph.n_layers)
        own = [torch.tensor([*range(*self.heads(layer).indices(10**9)), self.mlp(layer)]) for layer in layers]
        return torch.cat([torch.tensor([0]), *own])


@dataclass(frozen=True, eq=False)
class Plan:
    """What is the same for every mask in one block of layers.

    Readers stand in the order of the graph; those of the last block end with the logits.

    Attributes:
        layers: of the block.
        before: slots written before its first layer reads.
        edges: the block's in the order of the graph.
        places: where its edges stand in [reader, slot], flattened.
        template: [reader, slot], 1 at further slots that a reader reads and 0 elsewhere.
    """

    layers: range
    before: int
    edges: slice
    places: Int[Tensor, " edge"]
    template: Float[Tensor, "reader slot"]


@cache
def plans(graph: Graph, device: torch.device) -> tuple[Plan, ...]:
    """The blocks of a model, in order."""
    firsts = range(0, graph.n_layers, LAYERS_AT_ONCE)
    return tuple(_plan(graph, range(first, min(first + LAYERS_AT_ONCE, graph.n_layers)), device) for first in firsts)


def _plan(graph: Graph, layers: range, device: torch.device) -> Plan:
    slots, by_layer = Slots(graph), (graph.n_readers - 1) // graph.n_layers
    first, last = layers.start * by_layer, layers.stop * by_layer + (layers.stop == graph.n_layers)
    n_slots = slots.before(layers.stop)
    edges = slice(int(graph.first_edge[first]), int(graph.first_edge[last - 1] + graph.n_read[last - 1]))
    places = (graph.edge_readers[edges] - first) * n_slots + slots.of_sources()[graph.edge_sources[edges]]
    template = torch.zeros(last - first, n_slots)
    template[:, 1] = 1
    for layer in range(layers.stop):
        reads_heads = graph.n_read[first:last] > 1 + layer * (graph.n_heads + 1)
        template[reads_heads, slots.standing(layer)] = 1
    return Plan(layers, slots.before(layers.start), edges, places.to(device), template.to(device))


class Block:
    """The masks of one block of layers, and what its readers read.

    Attributes:
        plan: of the block.
        keep: masks, by slot.
        to_keep: gradients to them, right at the edges only.
        inputs: of the readers; in the backward pass replaced by the gradients to them, reader by reader.
    """

    def __init__(self, plan: Plan, mask: Float[Tensor, "row edge"], dtype: torch.dtype) -> None:
        self.plan = plan
        self.keep: Float[Tensor, "row reader slot"] = plan.template.to(dtype).repeat(len(mask), 1, 1)
        self.keep.flatten(1).index_copy_(1, plan.places, mask[:, plan.edges].to(dtype))
        self.to_keep: Tensor | None = None
        self.inputs: Float[Tensor, "reader row position d_model"] | None = None

    def cut(self) -> Float[Tensor, "row reader slot"]:
        """How much of a replacement's gradient comes through each edge."""
        through = self.keep.new_zeros(self.keep.shape)
        edges = self.keep.flatten(1).index_select(1, self.plan.places)
        through.flatten(1).index_copy_(1, self.plan.places, torch.where(edges < ABLATED_BELOW, 1 - edges, 0.0))
        return through

    def gradient_of_mask(self) -> Float[Tensor, "row edge"]:
        """To the block's edges."""
        assert self.to_keep is not None
        return self.to_keep.flatten(1).index_select(1, self.plan.places)


class Buffers:
    """What has been written in one run of a model, and what is read of it.

    Args:
        workspace: of the model.
        graph: of the model.
        mask: of each row.
        kept: tokens at which every reader reads the model's own residual stream.
        d_model: width of the residual stream.
        dtype: of everything here.
        saves: whether a backward pass will come.
        recompute: whether it is to mix again what readers read.
        constants: numbers of rows and positions over which gradients of replacements are kept apart; None where
            they need none.
        centred: whether nobody sees the mean over dimensions of what is written, so that it is taken off.
    """

    def __init__(
        self,
        workspace: Workspace,
        graph: Graph,
        mask: Float[Tensor, "row edge"],
        kept: Bool[Tensor, "row position"],
        d_model: int,
        dtype: torch.dtype,
        saves: bool,
        recompute: bool,
        constants: tuple[int, int] | None,
        centred: bool,
    ) -> None:
        self.slots = Slots(graph)
        self._workspace = workspace
        self._centred = centred
        self._saves = saves
        self.keeps_inputs = saves and not recompute
        self.shape = (*kept.shape, d_model)
        self._kept = kept.nonzero(as_tuple=True)
        self.blocks = [Block(plan, mask, dtype) for plan in plans(graph, mask.device)]
        self.by_layer = (graph.n_readers - 1) // graph.n_layers
        n_slots = self.slots.before(graph.n_layers)
        self._kind = dtype, mask.device
        self.written: Float[Tensor, "slot row position d_model"] = self._take("written", n_slots)
        self.gradient: Tensor | None = None
        self._spent = False
        self._constants_shape = constants
        self.to_constants: Tensor | None = None
        self._inputs: Float[Tensor, "reader row position d_model"] | None = None

    def _take(self, name: str, n_entries: int) -> Float[Tensor, "entry row position d_model"]:
        return self._workspace.take(name, (n_entries, *self.shape), *self._kind)

    def block(self, layer: int) -> Block:
        """The block of a layer."""
        return self.blocks[layer // LAYERS_AT_ONCE]

    def readers(self, layer: int) -> slice:
        """Where a layer's readers stand in its block: those of attention, then the MLP."""
        first = (layer - self.block(layer).plan.layers.start) * self.by_layer
        return slice(first, first + self.by_layer)

    def open(self, block: Block) -> None:
        """Mix what was written before a block for all of its readers."""
        sizes = [one.keep.shape[1] for one in self.blocks]
        number, n_readers = self.blocks.index(block), block.keep.shape[1]
        if self._inputs is None:
            self._inputs = self._take("inputs", sum(sizes) if self.keeps_inputs else max(sizes))
        if self.keeps_inputs:
            block.inputs = self._inputs[sum(sizes[:number]) :][:n_readers]
        else:
            for other in self.blocks:
                other.inputs = None
            block.inputs = self._inputs[:n_readers]
        self.mix(block, slice(0, n_readers), slice(0, block.plan.before), first=True)

    def mix(self, block: Block, readers: slice, slots: slice, first: bool = False) -> None:
        """Add what stands in slots to what readers read, or make it the first that they read."""
        assert block.inputs is not None
        if slots.start < slots.stop:
            _by_row(block.inputs[readers]).baddbmm_(
                block.keep[:, readers, slots], _by_row(self.written[slots]), beta=0 if first else 1
            )

    def cast(self, tensor: Tensor) -> Tensor:
        """To the data type of everything here."""
        return tensor.to(self.written.dtype)

    def centre(self, written: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """Take the mean off in place, where nobody sees it; this is its own transpose."""
        return written.sub_(written.mean(dim=-1, keepdim=True)) if self._centred else written

    def write(self, slots: slice, values: Tensor) -> None:
        """Fill slots."""
        self.written[slots] = values
        self.centre(self.written[slots])

    def keep_own(self, inputs: Float[Tensor, "reader row position d_model"], own: Tensor) -> None:
        """Let tokens that are never ablated be read from the model's own residual stream."""
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
        self.gradient = self._take("gradient", len(self.written))
        if self._constants_shape is not None:
            self.to_constants = self.written.new_zeros(len(self.written), *self._constants_shape, self.shape[-1])

    def drop_own(self, gradients: Float[Tensor, "reader row position d_model"]) -> None:
        """The other side of `keep_own`: what is read there depends on no mask and no replacement."""
        rows, positions = self._kept
        gradients[:, rows, positions] = 0

    def unmix(self, block: Block, readers: slice, slots: slice, first: bool = False) -> None:
        """The other side of `mix`; gradients to what the readers read stand in its place.

        Args:
            block: of the readers.
            readers: in the block.
            slots: that they read.
            first: no other gradients have come to these slots before.
        """
        assert block.inputs is not None
        assert self.gradient is not None
        if slots.start < slots.stop:
            _by_row(self.gradient[slots]).baddbmm_(
                block.keep[:, readers, slots].transpose(1, 2), _by_row(block.inputs[readers]), beta=0 if first else 1
            )

    def gradient_of(self, slots: slice) -> Float[Tensor, "slot row position d_model"]:
        """To what was written, when all who have read it are done."""
        assert self.gradient is not None
        return self.centre(self.gradient[slots])

    def gradient_of_constants(
        self, slots: list[int], shape: torch.Size, scale: Tensor | None = None
    ) -> Float[Tensor, "slot row_or_1 position_or_1 d_model"]:
        """To the replacements of sources, in the space of the residual stream.

        Args:
            slots: of the sources.
            shape: rows and positions of the replacements.
            scale: what they were multiplied with at each token.
        """
        assert self.to_constants is not None
        total = self.centre(self.to_constants[slots])
        if scale is not None:
            total = total * scale
        return total.sum_to_size(len(total), *shape, total.shape[-1])

    def gradient_of_mask(self) -> Float[Tensor, "row edge"]:
        """To all edges."""
        return torch.cat([block.gradient_of_mask() for block in self.blocks], dim=1)

    def close(self, block: Block) -> None:
        """End with a block in the backward pass, when the gradients to what all of its readers read are there."""
        assert block.inputs is not None
        # The last block is the first whose gradients arrive.
        self.unmix(block, slice(0, block.keep.shape[1]), slice(0, block.plan.before), first=block is self.blocks[-1])
        gradients, n_slots = _by_row(block.inputs), block.keep.shape[2]
        block.to_keep = gradients @ _by_row(self.written[:n_slots]).transpose(1, 2)
        if self.to_constants is not None:
            self._add_to_constants(self.to_constants[:n_slots], block)
        block.inputs = None

    def _add_to_constants(
        self, total: Float[Tensor, "slot row_or_1 position_or_1 d_model"], block: Block
    ) -> None:
        cut, gradients = block.cut(), block.inputs
        assert gradients is not None
        if total.shape[2] == 1:
            gradients = gradients.sum(dim=2, keepdim=True)
        if total.shape[1] == 1:
            by_slot = cut.permute(2, 1, 0).flatten(1)
            total.view(len(total), -1).addmm_(by_slot, gradients.flatten(0, 1).flatten(1))
        else:
            _by_row(total).baddbmm_(cut.transpose(1, 2), _by_row(gradients))

    def end_forward(self) -> None:
        """Forget what no backward pass will need."""
        if not self._saves:
            self.free()
        elif not self.keeps_inputs:
            self.blocks[-1].inputs = None

    def free(self) -> None:
        """Give back all large tensors."""
        for name, tensor in (("written", self.written), ("inputs", self._inputs), ("gradient", self.gradient)):
            if tensor is not None:
                self._workspace.give(name, tensor)
        self.blocks = []
        del self.written, self._inputs, self.gradient, self.to_constants


def _by_row(tensor: Float[Tensor, "any row position d_model"]) -> Float[Tensor, "row any numbers"]:
    return tensor.flatten(2).transpose(0, 1)
