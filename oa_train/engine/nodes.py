"""The engine for nodes: units of any site mixed with their replacements.

Functions attached to the model's own modules compute mask * value + (1 - mask) * replacement for every entry of a
selection. `diagnostics.reference` does the same in slow and obvious code.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from oa_train.batches import TokenLayout
from oa_train.engine.values import Values
from oa_train.errors import TaskError
from oa_train.models.frozen import CausalLM
from oa_train.models.hooks import Tap
from oa_train.models.parts import find_parts
from oa_train.models.selection import Group, Nodes
from oa_train.models.sites import SITE_KINDS, Site
from oa_train.shapes import Bool, Float, Tensor

# Below this a mask entry counts as ablated and its constant receives gradients. A constant should be the best
# replacement of a unit that is fully ablated; trained on mixtures too, it would learn to correct their scale
# (Li & Janson 2024, appendix on partial ablation).
ABLATED_BELOW = 1e-3


def node_taps(
    model: CausalLM,
    nodes: Nodes,
    mask: Float[Tensor, "row entry"],
    values: Values,
    layout: TokenLayout,
    sites: Collection[Site] | None = None,
) -> list[Tap]:
    """Taps that mix the units of a selection with their replacements, in the order of a forward pass.

    `mask` and `values` are as in `masked_logits`; `layout` describes the tokens of the run. `sites` limits the taps to
    some of the sites.

    Raises:
        TaskError: a span is missing, or a row ablates a unit at two spans that share a token.
    """
    parts, spans = find_parts(model), {name: layout.span(name) for name in nodes.spans if name is not None}
    _check_overlaps(nodes, mask, spans)
    by_site: dict[Site, list[Group]] = {}
    for group in nodes.groups:
        if sites is None or group.site in sites:
            by_site.setdefault(group.site, []).append(group)
    places = {site: SITE_KINDS[site.kind].place_of(site.layer, parts, nodes.by_layer) for site in by_site}
    return [
        Tap(*places[site], _mixer(nodes, site, groups, mask, values, layout, spans))
        for site, groups in by_site.items()
    ]


def _check_overlaps(
    nodes: Nodes, mask: Float[Tensor, "row entry"], spans: dict[str, Bool[Tensor, "row position"]]
) -> None:
    """Refuse to replace a unit twice at one token; spans that may overlap are refused only if a row ablates both."""
    for first, second in nodes.span_pairs:
        sharing = (spans[first] & spans[second]).any(dim=1)
        if nodes.overlapping and bool(sharing.any()):
            numbers = [nodes.spans.index(first), nodes.spans.index(second)]
            twice = [units[:, numbers].all(dim=1).any(dim=1) for units in nodes.replaced(mask >= 1).values()]
            sharing = sharing & torch.stack(twice).any(dim=0)
        if bool(sharing.any()):
            raise TaskError(
                f"The spans {first!r} and {second!r} share a token, and both restrict the same unit: spans of one "
                "unit must not overlap. Select the unit at one of them."
            )


def _mixer(
    nodes: Nodes,
    site: Site,
    groups: list[Group],
    mask: Float[Tensor, "row entry"],
    values: Values,
    layout: TokenLayout,
    spans: dict[str, Bool[Tensor, "row position"]],
) -> Callable[[Tensor], Tensor]:
    kind, shape = SITE_KINDS[site.kind], (*layout.positions.shape, *nodes.sites[site])

    def mix(tensor: Tensor) -> Tensor:
        before = kind.read(tensor, shape, site.layer, nodes.by_layer)
        after = before
        for group in groups:
            ablatable = ~layout.protected if group.span is None else spans[group.span] & ~layout.protected
            of_units = mask[:, group.entries]
            if group.units is not None:
                units = torch.tensor(group.units, device=mask.device)
                of_units = mask.new_ones(len(mask), shape[2]).index_copy(1, units, of_units)
            keep = torch.where(ablatable.unsqueeze(-1), of_units.unsqueeze(1), 1.0).unsqueeze(-1)
            after = _Mixture.apply(after, keep, values.at(site, group.span))
        return kind.write(tensor, before, after, site.layer, nodes.by_layer)

    return mix


class _Mixture(torch.autograd.Function):
    """mask * value + (1 - mask) * replacement; the replacement's gradient comes from ablated units only.

    Written by hand because autograd would keep the replacement expanded to all rows and positions for every layer, and
    in half precision a copy of it as well.
    """

    @staticmethod
    def forward(context: Any, value: Tensor, mask: Tensor, replacement: Tensor) -> Tensor:
        context.save_for_backward(value, mask, replacement)
        # lerp is exact at both ends: mask 1 returns the value bit for bit, mask 0 the replacement.
        return torch.lerp(replacement.to(value.dtype), value, mask.to(value.dtype))

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        value, mask, replacement = context.saved_tensors
        grad_value, grad_mask, grad_replacement = None, None, None
        if context.needs_input_grad[0]:
            grad_value = gradient * mask.to(gradient.dtype)
        if context.needs_input_grad[1]:
            passed = gradient * (value - replacement.to(value.dtype))
            grad_mask = passed.sum(dim=-1, keepdim=True, dtype=mask.dtype)
        if context.needs_input_grad[2]:
            alone = gradient * torch.where(mask < ABLATED_BELOW, 1 - mask, 0.0).to(gradient.dtype)
            shared = [dim for dim in (0, 1) if replacement.shape[dim] == 1]
            summed = alone.sum(dim=shared, keepdim=True, dtype=replacement.dtype) if shared else alone
            grad_replacement = summed.to(replacement.dtype)
        return grad_value, grad_mask, grad_replacement
