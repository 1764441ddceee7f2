"""A slow and obvious reference implementation, against which the engine for nodes is tested.

The two share the table of families, the names of entries, and the finite attention masks. Everything else is
implemented again here: one row, one position and one unit at a time, with separate hooks, the mixture written out as
in the paper, and logits at all positions, from which the scored ones are picked at the end.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from oa_train.batches import Batch
from oa_train.engine.forward import as_written
from oa_train.engine.values import Values
from oa_train.models.families import check_family
from oa_train.models.frozen import CausalLM
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import SITE_KINDS, Site
from oa_train.shapes import Float, Tensor


def reference_node_logits(
    model: CausalLM, batch: Batch, nodes: Nodes, mask: Float[Tensor, "row entry"], values: Values
) -> Float[Tensor, "row scored vocabulary"]:
    """Reference implementation of `masked_logits` for nodes, with loops over rows, positions and units."""
    handles = []
    for site in nodes.sites:
        module, is_input = _module(model, nodes, site)
        change = _site_changer(batch, nodes, site, mask, values)
        if is_input:
            hook = module.register_forward_pre_hook(lambda _, args, change=change: (change(args[0]), *args[1:]))
        else:
            hook = module.register_forward_hook(lambda _, __, output, change=change: _on_first(output, change))
        handles.append(hook)
    return run_with_hooks(model, batch, handles)


def _on_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _module(model: CausalLM, nodes: Nodes, site: Site) -> tuple[nn.Module, bool]:
    """Module of a site, and whether the site is its input."""
    family = check_family(model.config.model_type)
    blocks: Any = model.get_submodule(family.blocks)
    if site.kind == "features":
        name = nodes.by_layer[site.layer].site
        kind = {"r": "residual", "m": "mlp", "a": "attention"}[name[0]]
        return _module(model, nodes, Site(kind, int(name[1:])))
    if site.kind == "tokens":
        return model.get_input_embeddings(), False
    if site.kind in ("embedding", "residual"):
        last = site.layer == len(blocks)
        return (model.get_submodule(family.final_norm) if last else blocks[site.layer]), True
    block = blocks[site.layer]
    if site.kind == "heads":
        return block.get_submodule(family.attention_output), True
    if site.kind == "neurons":
        return block.get_submodule(family.down_projection), True
    if site.kind == "attention":
        return block.get_submodule(family.attention_post_norm or family.attention_output), False
    if site.kind == "mlp":
        return block.get_submodule(family.mlp), False
    # A kind that is added later: only its entry in the table says where it is.
    module, side = SITE_KINDS[site.kind].place_of(site.layer, find_parts(model), nodes.by_layer)
    return module, side == "input"


def _site_changer(batch: Batch, nodes: Nodes, site: Site, mask: Tensor, values: Values) -> Callable[[Tensor], Tensor]:
    names = SITE_KINDS[site.kind].unit_names(site.layer, nodes.sites[site][0])
    entries = {name: number for number, name in enumerate(nodes.names)}
    tokens = {span: batch.layout.span(span) for span in nodes.spans if span is not None}

    def change(tensor: Tensor) -> Tensor:
        rows = enumerate(tensor.reshape(*batch.tokens.shape, -1))
        changed = [torch.stack([mixed(row, *cell) for cell in enumerate(vectors)]) for row, vectors in rows]
        return torch.stack(changed).view(tensor.shape)

    def mixed(row: int, column: int, vector: Tensor) -> Tensor:
        if site.kind == "features":
            dictionary = nodes.by_layer[site.layer].to(vector.device, vector.dtype)
            code = dictionary.encode(vector)
            for unit in range(len(code)):
                (new,) = mixed_unit(row, column, unit, code[unit : unit + 1])
                vector = vector + (new - code[unit]) * dictionary.w_dec[unit]
            return vector
        units = vector.split(len(vector) // len(names))
        return torch.cat([mixed_unit(row, column, unit, units[unit]) for unit in range(len(names))])

    def mixed_unit(row: int, column: int, unit: int, value: Tensor) -> Tensor:
        if batch.protected[row, column]:
            return value
        for span in nodes.spans:
            name = names[unit] if span is None else f"{names[unit]}@{span}"
            if name not in entries or not (span is None or tokens[span][row, column]):
                continue
            keep, replacement = mask[row, entries[name]], _pick(values, site, span, row, column)[unit]
            # Replacements of partially kept units get no gradient.
            return keep * value + (1 - keep) * (replacement if keep < 0.001 else replacement.detach())
        return value

    return change


def run_with_hooks(model: CausalLM, batch: Batch, handles: Iterable[Any]) -> Float[Tensor, "row scored vocabulary"]:
    """Run a model with hooks attached, remove the hooks, and pick the logits at the scored positions one by one."""
    try:
        with as_written(model):
            logits = model(
                input_ids=batch.tokens,
                attention_mask=batch.attention_mask.long(),
                position_ids=batch.positions,
                use_cache=False,
            ).logits
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(
        [torch.stack([logits[row, int(column)] for column in batch.scored[row]]) for row in range(len(batch))]
    )


def _pick(values: Values, site: Site, span: str | None, row: int, column: int) -> Float[Tensor, "unit width"]:
    tensor, slot = values.tensors[site], values.slots.get(span)
    if isinstance(slot, Tensor):
        slot = int(slot[row, column])
    if tensor.shape[1] == 1:
        slot = 0
    return tensor[row if len(tensor) > 1 else 0, column if slot is None else slot]
