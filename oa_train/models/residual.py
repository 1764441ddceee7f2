"""The modules that read and write the residual stream, split into the single heads of projections, and norms.

A model projects one normed residual stream to all heads. If edges are cut, the query of every head and the key and
value of every group have their own inputs, and are projected by their slices of the weight; with equal inputs the
result is the model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oa_train.errors import ModelError
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.module_lookup import Lookup, looked_up
from oa_train.models.parts import find_parts
from oa_train.shapes import Float, Tensor


@dataclass(frozen=True, eq=False)
class AttentionReaders:
    """The queries, keys and values of one layer: `n_heads` queries, then `n_kv_heads` keys, then as many values.

    Attributes:
        norm: the norm through which they read the residual stream, if any.
        modules: the model's projections: one each for queries, keys and values, or a fused one.
        interleaved: whether a fused projection interleaves each head's query, key and value.
        n_heads: number of queries.
        n_kv_heads: number of keys, and of values.
    """

    norm: nn.Module | None
    modules: tuple[nn.Module, ...]
    interleaved: bool
    n_heads: int
    n_kv_heads: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of queries, of keys and of values."""
        return self.n_heads, self.n_kv_heads, self.n_kv_heads

    def by_reader(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Views [reader, d_head, ...] of queries, keys and values, in one tensor [width, ...] for each module."""
        if len(self.modules) == 3:
            queries, keys, values = (
                tensor.unflatten(0, (count, -1)) for tensor, count in zip(tensors, self.counts, strict=True)
            )
        elif self.interleaved:
            queries, keys, values = tensors[0].unflatten(0, (self.n_heads, 3, -1)).unbind(1)
        else:
            queries, keys, values = tensors[0].unflatten(0, (sum(self.counts), -1)).split(self.counts)
        return queries, keys, values

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the weights of queries, keys and values: [reader, d_head, d_model]."""
        return self.by_reader([weight_and_bias(module)[0] for module in self.modules])

    @property
    def n_weights(self) -> int:
        """Number of elements in the weights of all modules."""
        return sum(weight_and_bias(module)[0].numel() for module in self.modules)

    def weights_times(
        self, gain: Float[Tensor, " d_model"], out: Float[Tensor, " n_weights"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weights, written into `out`, with each dimension of the input multiplied by a gain."""
        weights = [weight_and_bias(module)[0] for module in self.modules]
        scaled = []
        for weight, part in zip(weights, out.split([weight.numel() for weight in weights]), strict=True):
            # In the memory layout of the module's weight, so that both are traversed in the same order.
            same = part.view(weight.shape) if weight.is_contiguous() else part.view(weight.T.shape).T
            scaled.append(torch.mul(weight, gain, out=same))
        return self.by_reader(scaled)


@dataclass(frozen=True, eq=False)
class ResidualParts:
    """The modules of one model through which the residual stream is read and written, layer by layer.

    Attributes:
        attention: queries, keys and values.
        post_norms: norms of the attention outputs; empty if there are none.
        mlp_inputs: modules through which the MLPs read the residual stream.
        mlp_bodies: modules with the MLPs' hidden layers, which can be run again; empty if the blocks hold those.
        bypassed: modules by name whose input and output are unused if edges are cut: blocks, and modules around or
            between the attention projections.
    """

    attention: tuple[AttentionReaders, ...]
    post_norms: tuple[nn.Module, ...]
    mlp_inputs: tuple[nn.Module, ...]
    mlp_bodies: tuple[nn.Module, ...]
    bypassed: tuple[tuple[str, nn.Module], ...]


def find_residual_parts(model: CausalLM) -> ResidualParts:
    """The modules that read and write the residual stream of a model; the result is cached for each model.

    Raises:
        ModelError: as in `find_parts`; or an attention projection is not a plain linear map.
    """
    return looked_up(model, _find_residual_parts)


def _find_residual_parts(model: CausalLM, lookup: Lookup) -> ResidualParts:
    family, graph = find_parts(model).family, Graph.of(model.config)
    blocks = [lookup.get(model, f"{family.blocks}.{layer}") for layer in range(graph.n_layers)]

    def of_blocks(path: str) -> tuple[nn.Module, ...]:
        return tuple(lookup.get(block, path) for block in blocks) if path else ()

    norms = of_blocks(family.attention_norm) or (None,) * graph.n_layers
    by_path = {path: of_blocks(path) for path in (*family.projections, family.attention_output)}
    for path, modules in by_path.items():
        for layer, module in enumerate(modules):
            _check_plain(module, path, layer)
    around = [path.rsplit(".", depth)[0] for path in family.projections for depth in range(1, path.count(".") + 1)]
    bypassed = dict.fromkeys(path for path in (*around, family.attention_norm, family.attention_post_norm) if path)
    return ResidualParts(
        attention=tuple(
            AttentionReaders(norm, tuple(modules), family.interleaved, graph.n_heads, graph.n_kv_heads)
            for norm, *modules in zip(norms, *(by_path[path] for path in family.projections), strict=True)
        ),
        post_norms=of_blocks(family.attention_post_norm),
        mlp_inputs=of_blocks(family.mlp_input),
        mlp_bodies=of_blocks(family.mlp_body),
        bypassed=(
            *((f"block {layer}", block) for layer, block in enumerate(blocks)),
            *((f"{path} of block {layer}", part) for path in bypassed for layer, part in enumerate(of_blocks(path))),
        ),
    )


# Other classes that compute `weight @ input + bias`; Conv1D stores its weight transposed.
_CONV1D = "transformers.pytorch_utils.Conv1D"
_FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check_plain(module: Any, path: str, layer: int) -> None:
    """Refuse modules that do not compute just `weight @ input + bias`: adapters, quantised and other layers."""
    packed = _is_quantised(module)
    if (type(module) is nn.Linear or _class_path(module) in (_CONV1D, _FALCON_LINEAR)) and not packed:
        return
    if hasattr(module, "base_layer"):
        reason, advice = (
            "an adapter, which adds its own map to the weight",
            "Merge the adapter into the weights (model = model.merge_and_unload())",
        )
    elif packed:
        reason, advice = (
            "quantised, so that its weight is stored as codes",
            "Load the model with weights that are not quantised (lm.dtype: bfloat16 takes the least memory)",
        )
    else:
        reason, advice = (
            "neither torch.nn.Linear nor transformers' Conv1D, and may compute something other than its weight says",
            "Put a plain torch.nn.Linear in its place",
        )
    raise ModelError(
        f"Circuits of edges need plain linear projections, and {path} of layer {layer} is {reason} "
        f"({_class_path(module)}). Every head's query, key and value has an input of its own there, which is "
        f"multiplied with that head's slice of the weight. {advice}; circuits of nodes (level: nodes) work with this "
        "model as it is."
    )


def _is_quantised(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if any(kind.__module__.partition(".")[0] in ("bitsandbytes", "torchao") for kind in (type(module), type(weight))):
        return True
    # Packed weights are integers, have another name (qweight), or have 8 bits per element.
    return not hasattr(module, "base_layer") and not (
        isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    )


def weight_and_bias(module: nn.Module) -> tuple[Float[Tensor, "out into"], Float[Tensor, " out"] | None]:
    """A view of the weight of a linear map, and its bias, if it has one."""
    weight: Any = module.weight
    bias: Any = module.bias
    return weight.T if _class_path(module) == _CONV1D else weight, bias


def head_weights(projection: nn.Module, n_heads: int) -> Float[Tensor, "head d_head d_model"]:
    """A view of an attention output projection as the maps from each head's value to its output."""
    by_head: Tensor = weight_and_bias(projection)[0].T.unflatten(0, (n_heads, -1))
    return by_head


@dataclass(frozen=True, eq=False)
class NormWeights:
    """A norm as (x - mean of x) / sqrt(mean square + epsilon) * gain + bias.

    An RMS norm subtracts no mean and has no bias. A gain of None means ones, a bias of None zeros.
    """

    epsilon: float
    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None

    @classmethod
    def of(cls, norm: Any) -> "NormWeights":
        """Weights of one of Hugging Face's norms."""
        if is_layer_norm(norm):
            # OLMo's norm has no parameters, and its epsilon is hard-coded.
            return cls(getattr(norm, "eps", 1e-5), getattr(norm, "weight", None), getattr(norm, "bias", None))
        epsilon = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
        # Families store the gain in different ways, so it is read off the norm of a vector of ones.
        ones = torch.ones_like(norm.weight, dtype=torch.promote_types(norm.weight.dtype, torch.float32))
        return cls(epsilon, norm.forward(ones) * (1 + epsilon) ** 0.5, None)

    def factor(self, inputs: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token 1"]:
        """1 / sqrt(mean square + epsilon) of inputs with mean zero, in at least float32."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        length = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True, dtype=dtype)
        factor: Tensor = (length.square() / inputs.shape[-1] + self.epsilon).rsqrt()
        return factor


def is_layer_norm(norm: nn.Module) -> bool:
    """True for norms that subtract the mean, False for RMS norms."""
    return hasattr(norm, "normalized_shape") and not isinstance(norm, nn.RMSNorm)


def rms_norm_scale(norm: nn.Module, total: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
    """Factor by which an RMS norm multiplies each token and dimension of its input, with gradients to the input."""
    weights = NormWeights.of(norm)
    assert weights.gain is not None
    return (weights.factor(total) * weights.gain).to(total.dtype)
