"""Queries, keys and values of single heads: each projected from an input of its own.

A model projects one normed residual stream to all heads. Here every head's query, every group's key and value may come
from a stream of its own; with equal streams the result is the model's.
"""

from collections.abc import Sequence
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
        norm: through which they read the residual stream; None where there is none.
        modules: the model's projections; one for each of the three, or one for all.
        interleaved: whether one for all puts each head's three side by side.
        n_heads: queries.
        n_kv_heads: keys, and values.
    """

    norm: nn.Module | None
    modules: tuple[nn.Module, ...]
    interleaved: bool
    n_heads: int
    n_kv_heads: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Readers of each of the three kinds."""
        return self.n_heads, self.n_kv_heads, self.n_kv_heads

    def by_reader(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Views of what is laid out as the modules' outputs are, for queries, keys and values: [reader, d_head, ...].

        Args:
            tensors: [width, ...], one for each module.
        """
        if len(self.modules) == 3:
            queries, keys, values = (
                one.unflatten(0, (count, -1)) for one, count in zip(tensors, self.counts, strict=True)
            )
        elif self.interleaved:
            queries, keys, values = tensors[0].unflatten(0, (self.n_heads, 3, -1)).unbind(1)
        else:
            every = tensors[0].unflatten(0, (sum(self.counts), -1))
            queries, keys, values = every.split(self.counts)
        return queries, keys, values

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the weights of queries, keys and values: [reader, d_head, d_model]."""
        return self.by_reader([weight_and_bias(module)[0] for module in self.modules])

    @property
    def n_weights(self) -> int:
        """Numbers in the weights of all modules."""
        return sum(weight_and_bias(module)[0].numel() for module in self.modules)

    def weights_times(
        self, gain: Float[Tensor, " d_model"], out: Float[Tensor, " n_weights"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with each dimension of the input multiplied by a gain; they stand in `out`."""
        weights = [weight_and_bias(module)[0] for module in self.modules]
        made = []
        for weight, part in zip(weights, out.split([weight.numel() for weight in weights]), strict=True):
            # Laid out as the module's own, or the one would be read along rows and the other written along columns.
            same = part.view(weight.shape) if weight.is_contiguous() else part.view(weight.T.shape).T
            made.append(torch.mul(weight, gain, out=same))
        return self.by_reader(made)

    def project(self, inputs: Float[Tensor, "row reader position d_model"]) -> tuple[Tensor, ...]:
        """What the modules return when every reader has its own normed input: [row, position, width] each."""
        parts = [
            torch.einsum("rkpd,ked->rpke", one, weight)
            for one, weight in zip(inputs.split(self.counts, dim=1), self.weights(), strict=True)
        ]
        if len(self.modules) == 1:
            parts = [torch.stack(parts, dim=3) if self.interleaved else torch.cat(parts, dim=2)]
        biases = [weight_and_bias(module)[1] for module in self.modules]
        return tuple(
            part.flatten(2) if bias is None else part.flatten(2) + bias
            for part, bias in zip(parts, biases, strict=True)
        )


def attention_readers(model: CausalLM) -> tuple[AttentionReaders, ...]:
    """The readers of each layer's attention."""
    family, graph = check_family(model.config.model_type), Graph.of(model.config)
    blocks: Any = model.get_submodule(family.blocks)
    return tuple(_readers(family, graph, block) for block in blocks)


def _readers(family: Family, graph: Graph, block: nn.Module) -> AttentionReaders:
    return AttentionReaders(
        norm=block.get_submodule(family.attention_norm) if family.attention_norm else None,
        modules=tuple(block.get_submodule(path) for path in family.projections),
        interleaved=family.interleaved,
        n_heads=graph.n_heads,
        n_kv_heads=graph.n_kv_heads,
    )


def head_weights(projection: nn.Module, n_heads: int) -> Float[Tensor, "head d_head d_model"]:
    """A view of an attention output projection: what maps each head's value to what it writes."""
    by_head: Tensor = weight_and_bias(projection)[0].T.unflatten(0, (n_heads, -1))
    return by_head


def head_writes(
    projection: nn.Module, values: Float[Tensor, "row position head d_head"]
) -> Float[Tensor, "row head position d_model"]:
    """What each head adds to the residual stream, without the projection's bias.

    Args:
        projection: a layer's attention output projection.
        values: of its heads.
    """
    weights = head_weights(projection, values.shape[2])
    return torch.einsum("rphe,hed->rhpd", values, weights.to(values.dtype))


def weight_and_bias(module: nn.Module) -> tuple[Float[Tensor, "out into"], Float[Tensor, " out"] | None]:
    """A view of the weight of a linear map, and its bias, if it has one."""
    weight: Any = module.weight
    bias: Any = module.bias
    # GPT-2's Conv1D has its weight the other way round.
    return weight if isinstance(module, nn.Linear) else weight.T, bias
