"""Direct logit attribution: the part of the logit difference that each unit contributes directly.

The output of a unit reaches the logits through later layers, and directly through the final norm and the unembedding.
The direct path is linear once the scale of the final norm is fixed at that of the clean run. So the logit difference
is a sum of one term for each output that is written to the residual stream, and a bias (Elhage et al. 2021).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.metrics.measures import measured
from oa_train.models.frozen import CausalLM
from oa_train.models.hooks import Tap
from oa_train.models.parts import Parts, find_parts
from oa_train.models.residual import NormWeights, is_layer_norm, rms_norm_scale
from oa_train.models.selection import Nodes
from oa_train.models.sites import SITE_KINDS
from oa_train.shapes import Float, Tensor


def direct_attribution(model: CausalLM, batch: Batch, nodes: Nodes) -> Float[Tensor, "row entry"]:
    """Each unit's direct contribution to the clean model's logit difference, in nats, averaged over positions.

    Where the logit difference is not linear in the logits (several answers, or soft-capping), it is linearised at the
    clean run. The scales of norms after attention or an MLP are also fixed at their values in the clean run.

    Units at a span count there only; those of kinds without `SiteKind.writes` (the stream before a block, token
    embeddings, features of dictionaries) get NaN.
    """
    parts, rows = find_parts(model), torch.arange(len(batch), device=batch.tokens.device).unsqueeze(1)
    seen: dict[tuple[nn.Module, str], Tensor] = {}

    def scored(tensor: Tensor) -> Tensor:
        """A module's tensor at the scored columns: [row, scored, width]."""
        return tensor.detach().reshape(*batch.tokens.shape, -1)[rows, batch.scored]

    def keep(module: nn.Module, side: str, tensor: Tensor) -> None:
        seen[module, side] = scored(tensor)

    writing = {site: writes for site in nodes.sites if (writes := SITE_KINDS[site.kind].writes) is not None}
    places = {site: SITE_KINDS[site.kind].place_of(site.layer, parts, nodes.by_layer) for site in writing}
    writers = {site: writes(parts, site.layer) for site, writes in writing.items()}
    taps = [Tap(*place, partial(keep, *place)) for place in places.values()]
    normed = [modules[1] for modules in writers.values() if modules and _has_post_norm(*modules)]
    taps += [Tap(module, "input", partial(keep, module, "input")) for module in normed]
    direction = _direction(model, batch, parts, taps, scored)
    attribution = torch.full((len(batch), len(nodes)), torch.nan, dtype=direction.dtype, device=direction.device)
    for group in nodes.groups:
        if group.site not in writers:
            continue
        values, along, modules = seen[places[group.site]], direction, writers[group.site]
        if modules:
            projection, adding = modules
            if _has_post_norm(projection, adding):
                along = along * rms_norm_scale(adding, seen[adding, "input"])
            along = _pulled_back(projection, values, along)
        of_units = (values.to(along.dtype) * along).unflatten(-1, nodes.sites[group.site]).sum(dim=-1)
        inside = ~batch.protected if group.span is None else batch.layout.span(group.span) & ~batch.protected
        total = (of_units * inside.gather(1, batch.scored).unsqueeze(-1)).sum(dim=1)
        attribution[:, group.entries] = total if group.units is None else total[:, list(group.units)]
    return attribution


def _has_post_norm(projection: nn.Module, adding: nn.Module) -> bool:
    return all(module is not projection for module in adding.modules())


@torch.enable_grad()
def _direction(
    model: CausalLM, batch: Batch, parts: Parts, taps: list[Tap], scored: Callable[[Tensor], Tensor]
) -> Float[Tensor, "row scored d_model"]:
    """Gradient of each prompt's logit difference with respect to the input of the final norm, whose scale is fixed."""
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def enter(residual: Tensor) -> None:
        entering.append(scored(residual))

    def leave(normed: Tensor) -> Tensor:
        leaving.append(normed.detach().requires_grad_())
        return leaving[0]

    final = [Tap(parts.final_norm, "input", enter), Tap(parts.final_norm, "output", leave)]
    logits = scored_logits(model, batch, [*taps, *final])
    total = measured("logit_difference", logits, logits, batch).sum()
    (gradient,) = torch.autograd.grad(total, leaving)
    norm, residual = NormWeights.of(parts.final_norm), entering[0]
    centred = is_layer_norm(parts.final_norm)
    if centred:
        residual = residual - residual.mean(dim=-1, keepdim=True)
    factor = norm.factor(residual)
    direction = scored(gradient).to(factor.dtype) * factor
    if norm.gain is not None:
        direction = direction * norm.gain.detach()
    return direction - direction.mean(dim=-1, keepdim=True) if centred else direction


@torch.enable_grad()
def _pulled_back(projection: nn.Module, values: Tensor, direction: Tensor) -> Tensor:
    """The transposed linear map applied to a direction; by autograd, so that weights may have any format."""
    entering = values.detach().requires_grad_()
    output: Tensor = projection(entering.flatten(0, 1))
    (gradient,) = torch.autograd.grad(output, entering, direction.flatten(0, 1).to(output.dtype))
    return gradient.to(direction.dtype)
