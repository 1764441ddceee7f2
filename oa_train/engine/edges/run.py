"""Edge interventions: every reader of the residual stream gets an input of its own.

A reader's input is the sum, over the sources that write before it, of mask * what the source writes + (1 - mask) *
its replacement, and the biases of the attention outputs, which belong to no head. The model's own residual stream is
computed as well and read by nobody, but where a token is never ablated.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from oa_train.ablations.base import SourceValues
from oa_train.batches import Batch
from oa_train.engine.forward import protected, scored_logits
from oa_train.engine.edges.operations import KernelStream
from oa_train.engine.nodes import ABLATED_BELOW
from oa_train.engine.edges.stream import Stream
from oa_train.models.families import check_family, find_parts
from oa_train.models.graph import Graph
from oa_train.models.loading import CausalLM
from oa_train.models.norms import rms_norm_scale
from oa_train.models.projections import attention_readers, head_writes, weight_and_bias
from oa_train.models.taps import Tap, recomputed, replaced_forwards, tapped
from oa_train.shapes import Bool, Float, Int, Tensor

Engine = Literal["kernels", "stock"]


def edge_logits(
    model: CausalLM,
    batch: Batch,
    mask: Float[Tensor, "row edge"],
    replacements: SourceValues,
    bos_token_id: int | None,
    recompute: bool = False,
    engine: Engine = "kernels",
) -> Float[Tensor, "row scored vocabulary"]:
    """Logits at the scored positions with every edge mixed with its source's replacement.

    Args:
        model: frozen causal language model.
        batch: one prompt for each row of the mask.
        mask: 1 keeps an edge, 0 cuts it; gradients flow to it.
        replacements: what stands in; receives gradients through edges whose mask is below `ABLATED_BELOW` only.
        bos_token_id: nothing that reads this token at the first position is changed.
        recompute: do not keep what readers read, nor what MLPs make of it on the way, for the backward pass, which
            then mixes and runs them again: less memory, more time, the same result.
        engine: `kernels` is fast; `stock` leaves all gradients to autograd, takes several times the memory, and is
            what the other is tested against.

    Raises:
        RuntimeError: in a second backward pass through one run of `kernels`, which frees and overwrites what it needs.
    """
    kept = protected(batch.tokens, batch.positions, bos_token_id)
    alone = batch.scored[:, 0] if batch.scored.shape[1] == 1 else None
    with mixed_edges(model, mask, replacements, kept, alone, recompute, engine):
        return scored_logits(model, batch)


@contextmanager
def mixed_edges(
    model: CausalLM,
    mask: Float[Tensor, "row edge"],
    replacements: SourceValues,
    kept: Bool[Tensor, "row position"],
    scored: Int[Tensor, " row"] | None = None,
    recompute: bool = False,
    engine: Engine = "kernels",
) -> Iterator[None]:
    """Have one call of a model, inside the context, read mixtures of what is written and what stands in.

    Args:
        model: that is called with as many rows and positions as `kept` has.
        mask: see `edge_logits`.
        replacements: see `edge_logits`.
        kept: tokens at which every reader reads the model's own residual stream.
        scored: the one token of each row whose logits are looked at; None if others are, too.
        recompute: see `edge_logits`.
        engine: see `edge_logits`.
    """
    stream = (KernelStream if engine == "kernels" else StockStream)(model, mask, replacements, kept, recompute)
    run = _Run(model, stream, kept, scored)
    again = recomputed(run.mlp_bodies() if recompute else (), ())
    with again, replaced_forwards([*run.projections(), *run.outputs()]), tapped(run.taps()):
        yield


class _Run:
    """Connects the modules of a model to the stream that stands in for its residual stream.

    Args:
        model: that runs.
        stream: what its parts read and write.
        kept: tokens that are never ablated.
        scored: the one token of each row that counts in the end, if there is only one.
    """

    def __init__(
        self, model: CausalLM, stream: Stream, kept: Bool[Tensor, "row position"], scored: Tensor | None
    ) -> None:
        self._model = model
        self._stream = stream
        self._shape = kept.shape
        self._kept = kept.nonzero(as_tuple=True)
        self._family = check_family(model.config.model_type)
        self._parts = find_parts(model)
        self._projected: tuple[Tensor, ...] = ()
        self._alone: int | None = None
        if scored is not None and self._family.mlp_input != self._family.attention_norm:
            # After the last layer's attention only that token counts, if the norm is not attention's as well.
            self._alone = len(self._parts.blocks) - 1
            self._scored = torch.arange(len(scored), device=kept.device), scored

    def projections(self) -> list[tuple[torch.nn.Module, Callable[..., Tensor]]]:
        """The projections to queries, keys and values, and what they are to do instead."""
        return [
            (module, self._returns(index))
            for readers in attention_readers(self._model)
            for index, module in enumerate(readers.modules)
        ]

    def _returns(self, module: int) -> Callable[..., Tensor]:
        return lambda hidden: self._projected[module].view(*hidden.shape[:-1], -1)

    def outputs(self) -> list[tuple[torch.nn.Module, Callable[..., Tensor]]]:
        """The attention output projections, of which only tokens that are never ablated are needed."""
        return [(projection, self._output(projection)) for projection in self._parts.attention_outputs]

    def _output(self, projection: torch.nn.Module) -> Callable[..., Tensor]:
        weight, bias = weight_and_bias(projection)

        @torch.no_grad()
        def output(values: Tensor) -> Tensor:
            made = F.linear(values.reshape(*self._shape, -1)[self._kept], weight, bias)
            return made.new_zeros(*self._shape, len(weight)).index_put(self._kept, made).view(*values.shape[:-1], -1)

        return output

    def mlp_bodies(self) -> list[torch.nn.Module]:
        """What makes of an MLP's input its output, where that is a module; nothing inside is read or replaced."""
        path = self._family.mlp_body
        return [block.get_submodule(path) for block in self._parts.blocks] if path else []

    def taps(self) -> list[Tap]:
        """What reads and writes at the model's modules."""
        taps: list[Tap] = []
        for layer, block in enumerate(self._parts.blocks):
            enters_mlp = block.get_submodule(self._family.mlp_input)
            taps += [
                Tap(block, "input", self._enters_block(layer)),
                Tap(enters_mlp, "input", self._enters_mlp(layer)),
                Tap(self._parts.attention_outputs[layer], "input", self._heads_write(layer)),
                Tap(self._parts.mlps[layer], "output", self._mlp_writes(layer)),
            ]
        return [*taps, Tap(self._model.get_submodule(self._family.final_norm), "input", self._enters_last_norm)]

    def _by_row(self, hidden: Tensor) -> Float[Tensor, "row position any"]:
        # Some families put rows and positions into one dimension.
        return hidden.view(*self._shape, -1)

    def _enters_block(self, layer: int) -> Callable[[Tensor], Tensor]:
        def enter(hidden: Tensor) -> Tensor:
            own = self._by_row(hidden)
            if layer == 0:
                self._stream.write_input(own)
            self._projected = self._stream.read_attention(layer, own)
            # No gradient ever flows along the model's own stream.
            return hidden.detach()

        return enter

    def _enters_mlp(self, layer: int) -> Callable[[Tensor], Tensor]:
        def enter(hidden: Tensor) -> Tensor:
            read = self._stream.read_mlp(layer, self._by_row(hidden))
            if layer != self._alone:
                return read.view(hidden.shape)
            return read[self._scored].view(len(read), *[1] * (hidden.dim() - 2), -1)

        return enter

    def _enters_last_norm(self, hidden: Tensor) -> Tensor:
        return self._stream.read_last(self._by_row(hidden)).view(hidden.shape)

    def _heads_write(self, layer: int) -> Callable[[Tensor], None]:
        sizes = self._parts.dimensions

        def write(values: Tensor) -> None:
            by_head = values.reshape(*self._shape, sizes.n_heads, sizes.d_head)
            self._stream.write_heads(layer, by_head, self._post_norm_scale(layer, by_head))

        return write

    def _post_norm_scale(self, layer: int, values: Tensor) -> Tensor | None:
        """What the norm after attention multiplies each token and dimension with, in the sum of all heads."""
        if not self._family.attention_post_norm:
            return None
        total = F.linear(values.flatten(2), *weight_and_bias(self._parts.attention_outputs[layer]))
        return rms_norm_scale(self._parts.blocks[layer].get_submodule(self._family.attention_post_norm), total)

    def _mlp_writes(self, layer: int) -> Callable[[Tensor], Tensor]:
        def write(output: Tensor) -> Tensor:
            if layer == self._alone:
                everywhere = output.new_zeros(*self._shape, output.shape[-1])
                everywhere = everywhere.index_put(self._scored, output.flatten(0, -2))
                output = everywhere.flatten(0, 3 - output.dim())  # as flat as it comes
            self._stream.write_mlp(layer, self._by_row(output))
            return output

        return write


class StockStream(Stream):
    """What has been written so far, mixed for its readers by plain operations.

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
        self._attention = attention_readers(model)
        self._outputs = find_parts(model).attention_outputs
        self._masks = mask.split(Graph.of(model.config).n_read.tolist(), dim=1)
        self._replacements = replacements
        self._kept = kept.unsqueeze(1).unsqueeze(-1)
        self._recompute = recompute
        self._written: list[Tensor] = []
        self._standing: list[Tensor] = []
        self._fixed: list[Tensor] = []  # the same without gradients to constants
        self._biases: list[tuple[int, Tensor]] = []  # after how many sources each was written
        self._n_written = 0
        self._next_reader = 0

    def write_input(self, embedded: Tensor) -> None:  # noqa: D102
        standing = self._replacements.inputs[0].unsqueeze(1)
        self._write(embedded.unsqueeze(1), standing, standing.detach())

    def read_attention(self, layer: int, own: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        readers = self._attention[layer]
        mixed = self._read(sum(readers.counts), own)
        # The method, not the module, which may have a tap for others who read through the same norm.
        return readers.project(mixed if readers.norm is None else readers.norm.forward(mixed))

    def write_heads(self, layer: int, values: Tensor, scale: Tensor | None) -> None:  # noqa: D102
        projection = self._outputs[layer]
        factor = 1.0 if scale is None else scale.unsqueeze(1)
        constants = self._replacements.heads[layer]
        # Through the factor a gradient flows to what was written before, whatever the mask.
        self._write(*(head_writes(projection, one) * factor for one in (values, constants, constants.detach())))
        bias = weight_and_bias(projection)[1]
        if bias is not None:
            self._biases.append((self._n_written, bias * factor))

    def read_mlp(self, layer: int, own: Tensor) -> Tensor:  # noqa: D102
        return self._read(1, own)[:, 0]

    def write_mlp(self, layer: int, output: Tensor) -> None:  # noqa: D102
        standing = self._replacements.mlps[layer].unsqueeze(1)
        self._write(output.unsqueeze(1), standing, standing.detach())

    def read_last(self, own: Tensor) -> Tensor:  # noqa: D102
        return self._read(1, own)[:, 0]

    def _write(
        self,
        written: Float[Tensor, "row source position d_model"],
        standing: Float[Tensor, "row_or_1 source position_or_1 d_model"],
        fixed: Float[Tensor, "row_or_1 source position_or_1 d_model"],
    ) -> None:
        self._written.append(written)
        self._standing.append(standing.to(written.dtype))
        self._fixed.append(fixed.to(written.dtype))
        self._n_written += written.shape[1]

    def _read(self, n_readers: int, own: Tensor) -> Float[Tensor, "row reader position d_model"]:
        """The inputs of the next readers, which have seen the same sources."""
        mask = torch.stack(self._masks[self._next_reader : self._next_reader + n_readers], dim=1)
        self._next_reader += n_readers
        n_read = mask.shape[-1]  # fewer than were written where attention and MLP run in parallel
        parts = [list(one) for one in (self._written, self._standing, self._fixed)]
        biases = [bias for after, bias in self._biases if after <= n_read]

        def mix() -> Tensor:
            written = torch.cat(parts[0], dim=1)[:, :n_read]
            standing, fixed = (_side_by_side(one)[:, :n_read] for one in parts[1:])
            mixed = _mixture(mask.to(written.dtype), written, standing, fixed)
            for bias in biases:
                mixed = mixed + bias
            return torch.where(self._kept, own.detach().unsqueeze(1), mixed)

        mixed: Tensor = checkpoint(mix, use_reentrant=False, preserve_rng_state=False) if self._recompute else mix()
        return mixed


def _mixture(
    mask: Float[Tensor, "row reader source"],
    written: Float[Tensor, "row source position d_model"],
    standing: Float[Tensor, "row_or_1 source position_or_1 d_model"],
    fixed: Float[Tensor, "row_or_1 source position_or_1 d_model"],
) -> Float[Tensor, "row reader position d_model"]:
    """Sum over sources of mask * written + (1 - mask) * standing, in one product of matrices for all readers."""
    shape = (len(mask), mask.shape[1], *written.shape[2:])
    mixed = (mask @ (written - fixed).flatten(2)).view(shape) + fixed.sum(dim=1, keepdim=True)
    if not standing.requires_grad:
        return mixed
    # Worth nothing, and carries the gradient of constants through the edges that are cut.
    cut = torch.where(mask < ABLATED_BELOW, 1 - mask, 0.0)
    passed = cut @ (standing - fixed).flatten(2)
    return mixed + passed.view(len(mask), mask.shape[1], *standing.shape[2:])


def _side_by_side(standing: list[Tensor]) -> Float[Tensor, "row_or_1 source position_or_1 d_model"]:
    rows = max(one.shape[0] for one in standing)
    positions = max(one.shape[2] for one in standing)
    return torch.cat([one.expand(rows, -1, positions, -1) for one in standing], dim=1)
