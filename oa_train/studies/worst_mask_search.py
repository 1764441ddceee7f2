"""The search for the worst mask of the parts outside a circuit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from oa_train.ablations.base import Ablation
from oa_train.ablations.registry import AblationSource
from oa_train.ablations.worst_mask import AscentSettings, ascend
from oa_train.metrics.measures import Loss
from oa_train.progress import Stage
from oa_train.seeds import torch_generator
from oa_train.shapes import Bool, Float, Tensor


@dataclass(frozen=True, eq=False)
class WorstMask:
    """The worst mask on the prompts of the search.

    Attributes:
        mask: values of all entries, in [0, 1].
        vertex: the worst mask of zeros and ones.
        losses: mean losses by name: `all_off`, `starts` and `ends` of the ascents, that of the worst of the
            `random_subsets`, `worst_vertex` and `worst`.
    """

    mask: Float[Tensor, " entry"]
    vertex: Float[Tensor, " entry"]
    losses: Mapping[str, Any]


def search_stages(ascent: AscentSettings, n_subsets: int) -> list[Stage]:
    """Stages of `worst_mask`."""
    n_starts = 1 + ascent.random_starts + min(n_subsets, 1)
    screening = [Stage("screening random subsets", n_subsets * ascent.n_prompts)] if n_subsets else []
    return [
        *screening,
        Stage("ascending", ascent.passes(n_starts)),
        Stage("evaluating vertices", n_starts * ascent.n_prompts),
    ]


def worst_mask(
    source: AblationSource,
    circuit: Bool[Tensor, " entry"],
    outside: Bool[Tensor, " entry"],
    subsets: Float[Tensor, "subset entry"],
    ablation: Ablation,
    ascent: AscentSettings,
    loss: Loss,
) -> WorstMask:
    """Search on validation prompts for the mask of the parts outside a circuit that has the largest loss.

    Ascents start with everything outside ablated, at random values, and at the worst of the random subsets. Their
    results are also rounded to masks of zeros and ones.

    Args:
        source: supplies model, level, prompts, the seed of the random values, and progress.
        circuit: entries that are kept; entries that are neither kept nor outside stay 0.
        outside: entries that may change.
        subsets: masks that keep random subsets of the outside parts; may be empty.
        ablation: supplies the replacements.
        ascent: settings of the ascents.
        loss: name of the loss to maximise.
    """
    model, task, level, track = source.model, source.task, source.level, source.track
    batches = list(task.batches("validation", ascent.n_prompts))

    def evaluated(masks: Tensor, description: str) -> Tensor:
        with track(len(masks) * ascent.n_prompts, description) as advance:
            still = replace(ascent, steps=0)
            return ascend(model, batches, level, masks, outside, ablation, still, loss, advance).losses

    all_off = circuit.float()
    starts, losses = [all_off], dict[str, Any]()
    for number in range(1, ascent.random_starts + 1):
        values = torch.rand(len(level), generator=torch_generator(task.seed, "ascent", number))
        starts.append(torch.where(outside, values, all_off))
    if len(subsets):
        of_subsets = evaluated(subsets, "screening random subsets")
        starts.append(subsets[of_subsets.argmax()])
        losses["random_subsets"] = float(of_subsets.max())
    with track(ascent.passes(len(starts)), "ascending") as advance:
        ascended = ascend(model, batches, level, torch.stack(starts), outside, ablation, ascent, loss, advance)
    rounded = ascended.masks.round()
    of_rounded = evaluated(rounded, "evaluating vertices")
    is_vertex = torch.tensor([True] + [False] * ascent.random_starts + [True] * min(len(subsets), 1))
    vertices = torch.cat([torch.stack(starts)[is_vertex], rounded])
    of_vertices = torch.cat([ascended.first_losses[is_vertex], of_rounded])
    masks, of_masks = torch.cat([ascended.masks, rounded]), torch.cat([ascended.losses, of_rounded])
    losses |= {
        "all_off": float(ascended.first_losses[0]),
        "starts": ascended.first_losses.tolist(),
        "ends": ascended.losses.tolist(),
        "worst_vertex": float(of_vertices.max()),
        "worst": float(of_masks.max()),
    }
    return WorstMask(masks[of_masks.argmax()], vertices[of_vertices.argmax()], losses)


def most_kept(
    mask: Float[Tensor, " entry"], outside: Bool[Tensor, " entry"], names: Sequence[str]
) -> dict[str, float]:
    """Values of a mask at the entries outside a circuit by name, the largest first."""
    entries = outside.nonzero().flatten()
    order = entries[mask[entries].argsort(descending=True, stable=True)]
    return {names[entry]: round(float(mask[entry]), 6) for entry in order.tolist()}
