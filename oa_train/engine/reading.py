"""Reading the values of a model's units on a batch of prompts."""

from functools import partial

import torch

from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.engine.values import Values
from oa_train.models.frozen import CausalLM
from oa_train.models.hooks import Tap
from oa_train.models.levels import Level
from oa_train.models.parts import find_parts
from oa_train.models.sites import SITE_KINDS, Site
from oa_train.shapes import Float, Tensor


def read_values(model: CausalLM, batch: Batch, level: Level) -> Values:
    """Values of every unit of a level's sites in every row and column of a clean run."""
    return clean_run(model, batch, level)[1]


@torch.no_grad()
def clean_run(model: CausalLM, batch: Batch, level: Level) -> tuple[Float[Tensor, "row scored vocabulary"], Values]:
    """Logits of a clean run, and the values of every unit of a level's sites in every row and column."""
    parts, tensors = find_parts(model), dict[Site, Tensor]()

    def read(site: Site, tensor: Tensor) -> None:
        layout = (*batch.tokens.shape, *level.sites[site])
        tensors[site] = SITE_KINDS[site.kind].read(tensor, layout, site.layer, level.by_layer)

    places = {site: SITE_KINDS[site.kind].place_of(site.layer, parts, level.by_layer) for site in level.sites}
    logits = scored_logits(
        model, batch, [Tap(*place, partial(read, site)) for site, place in places.items()], whole=True
    )
    return logits, Values(tensors)
