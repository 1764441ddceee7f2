"""Queries, keys and values of single heads: each projected from an input of its own.

A model projects one normed residual stream to all heads. Here every head's query, every group's key and value may come
from a stream of its own; with equal streams the result is the model's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oa_train.models.families import Family, check_family
from oa_train.models.graph import Graph
from oa_train.models.loading import CausalLM
from oa_train.shapes import Float, Tensor


@dataclass(frozen=True)
class AttentionReaders:
    """The queries, keys and values of one layer: `n_heads` queries, then `n_kv_heads` keys, then as many values.

    Attributes:
        norm: through which they read the residual stream; the identity where there is none.
        modules: the model's projections; one for each of the three, or one for all.
        interleaved: whether one for all puts each head's three side by side.
        n_heads: queries.
        n_kv_heads: keys, and values.
    """

    norm: Callable[[Tensor], Tensor]
    modules: tuple[nn.Module, ...]
    interleaved: bool
    n_heads: int
    n_kv_heads: int

    def project(self, module: int, inputs: Float[Tensor, "row reader position d_model"]) -> Tensor:
        """What a projection returns when every reader has its own normed input.

        Args:
            module: which of `modules`.
            inputs: of all readers of the layer.

        Returns:
            [row, position, width], laid out as the module does.
        """
        counts = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        first, count = (0, sum(counts)) if len(self.modules) == 1 else (sum(counts[:module]), counts[module])
        mine = inputs[:, first : first + count]
        weight, bias = _weight_and_bias(self.modules[module])
        if self.interleaved:
            # Rows of the weight go head by head, readers kind by kind.
            mine = mine.unflatten(1, (3, self.n_heads)).transpose(1, 2).flatten(1, 2)
        projected = torch.einsum("rkpd,ked->rpke", mine, weight.unflatten(0, (count, -1))).flatten(2)
        return projected if bias is None else projected + bias


def attention_readers(model: CausalLM) -> tuple[AttentionReaders, ...]:
    """The readers of each layer's attention."""
    family, graph = check_family(model.config.model_type), Graph.of(model.config)
    blocks: Any = model.get_submodule(family.blocks)
    return tuple(_readers(family, graph, block) for block in blocks)


def _readers(family: Family, graph: Graph, block: nn.Module) -> AttentionReaders:
    return AttentionReaders(
        # The method, not the module: it may have taps for those who read through the same norm.
        norm=block.get_submodule(family.attention_norm).forward if family.attention_norm else nn.Identity(),
        modules=tuple(block.get_submodule(path) for path in family.projections),
        interleaved=family.interleaved,
        n_heads=graph.n_heads,
        n_kv_heads=graph.n_kv_heads,
    )


def head_writes(
    projection: nn.Module, values: Float[Tensor, "row position head d_head"]
) -> Float[Tensor, "row head position d_model"]:
    """What each head adds to the residual stream, without the projection's bias.

    Args:
        projection: a layer's attention output projection.
        values: of its heads.
    """
    weight, _ = _weight_and_bias(projection)
    by_head = weight.unflatten(1, values.shape[2:])
    return torch.einsum("rphe,dhe->rhpd", values, by_head.to(values.dtype))


def output_bias(projection: nn.Module) -> Tensor | None:
    """Bias of a linear map, if it has one."""
    return _weight_and_bias(projection)[1]


def _weight_and_bias(module: nn.Module) -> tuple[Float[Tensor, "out into"], Tensor | None]:
    weight: Any = module.weight
    bias: Any = module.bias
    # GPT-2's Conv1D has its weight the other way round.
    return weight if isinstance(module, nn.Linear) else weight.T, bias
