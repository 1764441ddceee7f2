"""Edge interventions: every reader of the residual stream gets an input of its own.

A reader's input is the sum, over the sources that write before it, of mask * what the source writes + (1 - mask) *
its replacement, and the biases of the attention outputs, which belong to no head. The model's own residual stream is
computed as well and read by nobody, but where a token is never ablated.
"""

from collections.abc import Callable

import torch

from oa_train.ablations.base import SourceValues
from oa_train.batches import Batch
from oa_train.interventions.base import protected, scored_logits
from oa_train.interventions.nodes import ABLATED_BELOW
from oa_train.models.families import Parts, check_family, find_parts
from oa_train.models.graph import Graph
from oa_train.models.loading import CausalLM
from oa_train.models.projections import AttentionReaders, attention_readers, head_writes, output_bias
from oa_train.models.taps import Tap, replaced_forwards
from oa_train.shapes import Bool, Float, Tensor


def edge_logits(
    model: CausalLM,
    batch: Batch,
    mask: Float[Tensor, "row edge"],
    replacements: SourceValues,
    bos_token_id: int | None,
) -> Float[Tensor, "row scored vocabulary"]:
    """Logits at the scored positions with every edge mixed with its source's replacement.

    Args:
        model: frozen causal language model.
        batch: one prompt for each row of the mask.
        mask: 1 keeps an edge, 0 cuts it; gradients flow to it.
        replacements: what stands in; receives gradients through edges whose mask is below `ABLATED_BELOW` only.
        bos_token_id: nothing that reads this token at the first position is changed.
    """
    kept = protected(batch.tokens, batch.positions, bos_token_id)
    run = _Run(model, mask, replacements, kept)
    with replaced_forwards(run.projections()):
        return scored_logits(model, batch, run.taps())


class _Run:
    """What has been written so far in a run of a model, and what is read of it.

    Sources write, and readers read, in the order of the graph.

    Args:
        model: that runs.
        mask: of each row.
        replacements: of the sources.
        kept: tokens at which every reader reads the model's own residual stream.
    """

    def __init__(
        self,
        model: CausalLM,
        mask: Float[Tensor, "row edge"],
        replacements: SourceValues,
        kept: Bool[Tensor, "row position"],
    ) -> None:
        self._model = model
        self._family = check_family(model.config.model_type)
        self._parts: Parts = find_parts(model)
        self._attention: tuple[AttentionReaders, ...] = attention_readers(model)
        graph = Graph.of(model.config)
        self._masks = mask.split(graph.n_read.tolist(), dim=1)
        self._replacements = replacements
        self._kept = kept.unsqueeze(1).unsqueeze(-1)
        self._written: list[Tensor] = []
        self._standing: list[Tensor] = []
        self._fixed: list[Tensor] = []  # the same without gradients to constants
        self._biases: list[tuple[int, Tensor]] = []  # after how many sources each was written
        self._n_written = 0
        self._next_reader = 0
        self._normed: Tensor | None = None

    def projections(self) -> list[tuple[torch.nn.Module, Callable[..., Tensor]]]:
        """The projections to queries, keys and values, and what they are to do instead."""
        return [
            (module, self._projected(readers, index))
            for readers in self._attention
            for index, module in enumerate(readers.modules)
        ]

    def _projected(self, readers: AttentionReaders, module: int) -> Callable[..., Tensor]:
        def project(hidden: Tensor) -> Tensor:
            assert self._normed is not None
            return readers.project(module, self._normed).view(*hidden.shape[:-1], -1)

        return project

    def taps(self) -> list[Tap]:
        """What reads and writes at the model's modules."""
        taps: list[Tap] = []
        for layer, block in enumerate(self._parts.blocks):
            enters_mlp = block.get_submodule(self._family.mlp_input)
            taps += [
                Tap(block, "input", self._enters_block(layer)),
                Tap(enters_mlp, "input", self._reads_one),
                Tap(self._parts.attention_outputs[layer], "input", self._heads_write(layer)),
                Tap(self._parts.mlps[layer], "output", self._mlp_writes(layer)),
            ]
        return [*taps, Tap(self._model.get_submodule(self._family.final_norm), "input", self._reads_one)]

    def _enters_block(self, layer: int) -> Callable[[Tensor], None]:
        readers = self._attention[layer]

        def enter(hidden: Tensor) -> None:
            if layer == 0:
                standing = self._replacements.inputs[0].unsqueeze(1)
                self._write(hidden.unsqueeze(1), standing, standing.detach())
            self._normed = readers.norm(self._read(readers.n_heads + 2 * readers.n_kv_heads, hidden))

        return enter

    def _reads_one(self, hidden: Tensor) -> Tensor:
        return self._read(1, hidden).view(hidden.shape)

    def _heads_write(self, layer: int) -> Callable[[Tensor], None]:
        projection, sizes = self._parts.attention_outputs[layer], self._parts.dimensions

        def write(values: Tensor) -> None:
            by_head = values.reshape(*self._kept.shape[::2], sizes.n_heads, sizes.d_head)
            written = head_writes(projection, by_head)
            bias = output_bias(projection)
            scale = self._post_norm_scale(layer, written, bias)
            values_of_constants = self._replacements.heads[layer]
            standing, fixed = (
                head_writes(projection, one) for one in (values_of_constants, values_of_constants.detach())
            )
            # Through the scale a gradient flows to what was written before, whatever the mask.
            self._write(written * scale, standing * scale, fixed * scale)
            if bias is not None:
                self._biases.append((self._n_written, bias * scale))

        return write

    def _post_norm_scale(self, layer: int, written: Tensor, bias: Tensor | None) -> Tensor | float:
        """What the norm after attention multiplies each token and dimension with, in the sum of all heads."""
        if not self._family.attention_post_norm:
            return 1.0
        norm = self._parts.blocks[layer].get_submodule(self._family.attention_post_norm)
        total = written.sum(dim=1) if bias is None else written.sum(dim=1) + bias
        return _rms_norm_scale(norm, total).unsqueeze(1)

    def _mlp_writes(self, layer: int) -> Callable[[Tensor], None]:
        def write(output: Tensor) -> None:
            by_row = output.view(*self._kept.shape[::2], -1)
            standing = self._replacements.mlps[layer].unsqueeze(1)
            self._write(by_row.unsqueeze(1), standing, standing.detach())

        return write

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

    def _read(self, n_readers: int, hidden: Tensor) -> Float[Tensor, "row reader position d_model"]:
        """The inputs of the next readers, which have seen the same sources."""
        mask = torch.stack(self._masks[self._next_reader : self._next_reader + n_readers], dim=1)
        self._next_reader += n_readers
        n_read = mask.shape[-1]  # fewer than were written where attention and MLP run in parallel
        written = torch.cat(self._written, dim=1)[:, :n_read]
        standing, fixed = (_side_by_side(one)[:, :n_read] for one in (self._standing, self._fixed))
        mixed = _mixture(mask.to(written.dtype), written, standing, fixed)
        for after, bias in self._biases:
            if after <= n_read:
                mixed = mixed + bias
        own = hidden.view(written[:, 0].shape).unsqueeze(1)
        return torch.where(self._kept, own, mixed)


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


def _rms_norm_scale(norm: torch.nn.Module, total: Tensor) -> Tensor:
    """What an RMS norm multiplies its input with.

    Its gain is read off what it makes of ones, because families differ in how they store it.
    """
    epsilon = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    gain: Tensor = norm.forward(torch.ones_like(total[:1, :1])) * (1 + epsilon) ** 0.5
    return gain * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + epsilon)
