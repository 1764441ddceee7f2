"""The slow, obvious oracle that the fast interventions are tested against.

Nothing is shared with them but what keeps padding finite: one row, one position and one component at a time, with
hooks of its own, the mixture written out as in the paper, and logits at all positions from which the scored ones are
picked at the end.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from oa_train.ablations.base import SourceValues
from oa_train.batches import Batch
from oa_train.engine.forward import masks_within_single_precision
from oa_train.models.families import Dimensions, check_family
from oa_train.models.loading import CausalLM
from oa_train.shapes import Float, Tensor


def reference_node_logits(
    model: CausalLM,
    batch: Batch,
    mask: Float[Tensor, "row component"],
    replacements: SourceValues,
    bos_token_id: int | None,
) -> Float[Tensor, "row scored vocabulary"]:
    """Do what `engine.nodes.node_logits` does, in loops."""
    family = check_family(model.config.model_type)
    sizes = Dimensions.of(model.config)
    handles = []
    blocks: Any = model.get_submodule(family.blocks)
    for layer, block in enumerate(blocks):
        entries = mask[:, layer * (sizes.n_heads + 1) : (layer + 1) * (sizes.n_heads + 1)]

        def replace_heads(_: Any, args: Any, layer: int = layer, entries: Tensor = entries) -> tuple[Tensor, ...]:
            def value_of(row: int, column: int) -> Tensor:
                heads = args[0][row, column].split(sizes.d_head)
                stand_ins = _pick(replacements.heads[layer], row, column)
                mixed = [_mix(entries[row, h], heads[h], stand_ins[h]) for h in range(sizes.n_heads)]
                return torch.cat(mixed)

            return (_rebuild(args[0], batch, bos_token_id, value_of),)

        def replace_mlp(_: Any, __: Any, output: Tensor, layer: int = layer, entries: Tensor = entries) -> Tensor:
            by_row = output.view(*batch.tokens.shape, sizes.d_model)

            def value_of(row: int, column: int) -> Tensor:
                return _mix(entries[row, -1], by_row[row, column], _pick(replacements.mlps[layer], row, column))

            return _rebuild(by_row, batch, bos_token_id, value_of).view(output.shape)

        projection: nn.Module = block.get_submodule(family.attention_output)
        handles.append(projection.register_forward_pre_hook(replace_heads))
        handles.append(block.get_submodule(family.mlp).register_forward_hook(replace_mlp))
    return run_with_hooks(model, batch, handles)


def run_with_hooks(model: CausalLM, batch: Batch, handles: Iterable[Any]) -> Float[Tensor, "row scored vocabulary"]:
    """Run a model whose hooks are attached, take them off, and pick the logits at the scored positions one by one."""
    try:
        with masks_within_single_precision(model):
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


def _mix(keep: Tensor, value: Tensor, replacement: Tensor) -> Tensor:
    if keep < 0.001:
        return keep * value + (1 - keep) * replacement
    return keep * value + (1 - keep) * replacement.detach()


def _pick(values: Tensor, row: int, column: int) -> Tensor:
    return values[row if values.shape[0] > 1 else 0, column if values.shape[1] > 1 else 0]


def _rebuild(values: Tensor, batch: Batch, bos_token_id: int | None, value_of: Callable[[int, int], Tensor]) -> Tensor:
    rows = []
    for row in range(values.shape[0]):
        first = int(batch.attention_mask[row].long().argmax())
        columns = []
        for column in range(values.shape[1]):
            is_bos = column == first and int(batch.tokens[row, column]) == bos_token_id
            columns.append(values[row, column] if is_bos else value_of(row, column))
        rows.append(torch.stack(columns))
    return torch.stack(rows)
