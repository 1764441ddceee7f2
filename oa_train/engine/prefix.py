"""Runs several circuits at once; they share the clean layers before the first one that each of them ablates.

The model starts on the prompts alone. In the block where a circuit first ablates something, its rows join the batch as
copies of the clean rows, and attention masks, rotary tables and other inputs with a row for each prompt grow
accordingly. Where a circuit's first ablation comes after attention has mixed tokens, its rows skip that attention and
use the outputs of the clean rows' heads. So a circuit that ablates one unit of the last layer costs a part of one
layer, and the clean run costs nothing extra.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.engine.nodes import node_taps
from oa_train.engine.values import Values
from oa_train.models.frozen import CausalLM
from oa_train.models.hooks import CallFunction, Tap
from oa_train.models.parts import Parts, find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import SITE_KINDS, Site
from oa_train.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, eq=False)
class PrefixLogits:
    """Logits of the clean model and of every circuit, from one run."""

    clean: Float[Tensor, "batch scored vocabulary"]
    ablated: Float[Tensor, "circuit batch scored vocabulary"]


def prefix_logits(
    model: CausalLM, batch: Batch, nodes: Nodes, masks: Bool[Tensor, "circuit entry"], values: Values
) -> PrefixLogits:
    """Like `masked_logits` for several circuits on the same prompts, but with their clean layers shared.

    False entries are ablated. There are values for all rows, or for S * B rows of S circuits as `batch.repeat(S)` lays
    them out; gradients flow to them.
    """
    growth = _Growth(model, batch, nodes, masks)
    rows = batch.repeat(1 + len(masks))
    taps: list[Tap] = []
    for stage in range(growth.n_stages):
        n_rows = growth.counts[stage]
        sites = [site for site in nodes.sites if _moment(nodes, site) // 2 == stage]
        if sites:
            layout = rows.rows(slice(0, n_rows)).layout
            # Otherwise the values of the whole model would be copied, row by row, at every stage.
            own = values.only(sites).rows(growth.value_rows[:n_rows])
            taps += node_taps(model, nodes, growth.masks[:n_rows], own, layout, sites)
    start = batch.repeat(growth.counts[0] // len(batch))
    logits = scored_logits(model, start, taps, scored=rows.scored, changes=growth.changes(model))
    by_circuit = logits.unflatten(0, (1 + len(masks), len(batch)))
    return PrefixLogits(by_circuit[0], by_circuit[1:][growth.order.argsort()])


def saved_share(nodes: Nodes, masks: Bool[Tensor, "circuit entry"]) -> float:
    """Fraction of the work of separate runs that a shared prefix saves; negative if its clean rows cost more."""
    n_blocks = nodes.dimensions.n_layers * len(masks)
    if not n_blocks:
        return 0.0
    return 1 - own_blocks(nodes, masks).sum().item() / n_blocks - 1 / len(masks)


def own_blocks(nodes: Nodes, masks: Bool[Tensor, "circuit entry"]) -> Int[Tensor, " circuit"]:
    """Number of blocks that each circuit runs itself, from the first one in which it ablates something."""
    # The token embedding costs next to nothing.
    return nodes.dimensions.n_layers - (_first_moments(nodes, masks) // 2 - 1).clamp(min=0)


def _moment(nodes: Nodes, site: Site) -> int:
    """Place of a site in the order of the forward pass: 2 s in stage s, or 2 s + 1 after that stage's attention."""
    if site.kind == "tokens":
        return 0
    kind, layer = SITE_KINDS[site.kind], site.layer
    return 2 * (1 + kind.rank(layer, nodes.by_layer)[0]) + kind.is_after_attention(layer, nodes.by_layer)


def _first_moments(nodes: Nodes, masks: Bool[Tensor, "circuit entry"]) -> Int[Tensor, " circuit"]:
    """Moment (see `_moment`) at which each circuit first ablates something; the last one if it ablates nothing."""
    first, masks = torch.full((len(masks),), 2 * (nodes.dimensions.n_layers + 1)), masks.cpu()
    for group in reversed(nodes.groups):
        ablates = (~masks[:, group.entries]).any(dim=1)
        first[ablates] = _moment(nodes, group.site)
    return first


class _Growth:
    """The rows of a run at each stage, which grow as circuits join.

    Stage 0 is the token embedding, stage l + 1 begins with the input of block l, and the last stage with that of the
    final norm. The first rows are the clean prompts; circuits follow in the order in which they join.

    Attributes:
        counts: number of rows in each stage.
        attending: in each stage, how many rows (the first ones) run through attention; the others use the outputs of
            the clean rows' heads.
    """

    def __init__(self, model: CausalLM, batch: Batch, nodes: Nodes, masks: Bool[Tensor, "circuit entry"]) -> None:
        self._nodes, self._n_prompts, device = nodes, len(batch), batch.tokens.device
        self.n_stages = nodes.dimensions.n_layers + 2
        moments = _first_moments(nodes, masks)
        self.order: Int[Tensor, " circuit"] = moments.argsort(stable=True)
        joined = torch.stack([(moments <= moment).sum() for moment in range(2 * self.n_stages)])
        rows: list[int] = ((1 + joined) * self._n_prompts).tolist()
        self.attending, self.counts = rows[::2], rows[1::2]
        kept = torch.ones(self._n_prompts, len(nodes), device=device)
        ordered = masks[self.order.to(masks.device)].to(device, torch.float32)
        self.masks = torch.cat([kept, ordered.repeat_interleave(self._n_prompts, dim=0)])
        prompts = torch.arange(self._n_prompts, device=device)
        of_circuits = self.order.to(device).unsqueeze(1) * self._n_prompts + prompts
        # Nothing is replaced in clean rows, so the values of any circuit will do.
        self.value_rows = torch.cat([prompts, of_circuits.flatten()])

    def changes(self, model: CausalLM) -> Iterator[tuple[nn.Module, CallFunction]]:
        """The call changes through which rows join during a run."""
        parts = find_parts(model)
        for stage, module in enumerate([*parts.blocks, parts.final_norm], 1):
            yield module, self._joining(stage)
        yield from self._mixing(parts)

    def _mixing(self, parts: Parts) -> Iterator[tuple[nn.Module, CallFunction]]:
        """Call changes that skip attention, up to its output projection, for the rows that have just joined."""
        path = parts.family.attention_output.rpartition(".")[0]
        for stage, (block, projection) in enumerate(zip(parts.blocks, parts.attention_outputs, strict=True), 1):
            if self.attending[stage] == self.counts[stage] or self._reads_inside(stage, parts):
                continue
            attention = block.get_submodule(path)
            # Some attention modules add the residual stream themselves, or take inputs with a row per prompt and head.
            if not {"residual", "alibi"} & {*signature(attention.forward).parameters}:
                yield attention, self._leaving(stage)
                yield projection, self._returning(stage)

    def _reads_inside(self, stage: int, parts: Parts) -> bool:
        """True if a site of a stage may lie inside attention, before it has mixed tokens."""
        for site in self._nodes.sites:
            kind, by_layer = SITE_KINDS[site.kind], self._nodes.by_layer
            if _moment(self._nodes, site) == 2 * stage:
                module, _ = kind.place_of(site.layer, parts, by_layer)
                if module is not parts.blocks[stage - 1]:
                    return True
        return False

    def _leaving(self, stage: int) -> CallFunction:
        n_rows, n_attending = self.counts[stage], self.attending[stage]

        def leave(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def by_row(value: Any) -> Any:
                per_row = isinstance(value, Tensor) and value.dim() > 1 and len(value) == n_rows
                return value[:n_attending] if per_row else value

            return tree_map(by_row, args), tree_map(by_row, kwargs)

        return leave

    def _returning(self, stage: int) -> CallFunction:
        n_copies = (self.counts[stage] - self.attending[stage]) // self._n_prompts
        return lambda args, kwargs: ((self._grown(args[0], n_copies), *args[1:]), kwargs)

    def _grown(self, rows: Tensor, n_copies: int) -> Tensor:
        return torch.cat([rows, *[rows[: self._n_prompts]] * n_copies])

    def _joining(self, stage: int) -> CallFunction:
        before, n_rows = self.counts[stage - 1], self.counts[stage]

        def join(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden, *others = args
            copies = (n_rows - before) // self._n_prompts
            grown = self._grown(hidden, copies) if copies else hidden
            prompts = torch.arange(n_rows, device=hidden.device) % self._n_prompts

            def by_row(value: Any) -> Any:
                # The model passes to every block the inputs that it computed for the initial rows.
                per_row = isinstance(value, Tensor) and value.dim() > 1 and len(value) == self.counts[0] > 1
                return value[prompts] if per_row else value

            changed = tree_map(by_row, kwargs)
            if isinstance(kwargs.get("alibi"), Tensor):  # has a row for each prompt and head
                changed["alibi"] = kwargs["alibi"].unflatten(0, (self.counts[0], -1))[prompts].flatten(0, 1)
            return (grown, *tree_map(by_row, tuple(others))), changed

        return join
