"""Writable views of a model's weights, with the same interface for three families.

Queries, keys and values of single heads are views of whatever projections a family has. An MLP is a list of units:
each reads one direction, is rectified, and writes one vector.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from oa_train.models.families import check_family
from oa_train.models.frozen import CausalLM
from oa_train.models.parts import find_parts
from oa_train.models.residual import find_residual_parts, weight_and_bias
from oa_train.shapes import Float, Tensor

# A norm divides by the root of its input's variance plus epsilon. With an epsilon that dwarfs every variance, and its
# root as gain, the norm is the identity to within one part in ten million, apart from the mean that some subtract.
EPSILON = 1e8

# With gate z * STEEP and value 1 / STEEP a gated SiLU unit is a rectifier, to within 1e-9 for |z| > 0.4.
STEEP = 60.0


# Projections of a family's MLP: the one whose output is rectified, the one back to the residual stream, and, if there
# is a gate, the one that multiplies the rectified units.
MLP_NAMES = {
    "gpt2": ("c_fc", "c_proj", ""),
    "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h", ""),
    "llama": ("gate_proj", "down_proj", "up_proj"),
}


class Affine(NamedTuple):
    """Views of an affine map inside a model's parameters; writing to them writes the model."""

    weight: Float[Tensor, "out into"]
    bias: Float[Tensor, " out"]


class HandWrittenWeights:
    """The weights of a model, all zero except those of the norms, which leave the residual stream unchanged.

    Args:
        model: its weights are overwritten. Its norms must have the epsilon `EPSILON`, and its projections biases.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.parts = find_parts(model)
        self._family = check_family(model.config.model_type)
        self._readers = find_residual_parts(model).attention
        self._mlp_names = MLP_NAMES[model.config.model_type]
        self._used_units = [0] * self.parts.dimensions.n_layers
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            for norm in self._norms():
                norm.weight.fill_(EPSILON**0.5)

    def _norms(self) -> list[Any]:
        paths = {self._family.attention_norm, self._family.mlp_input}
        norms = [block.get_submodule(path) for block in self.parts.blocks for path in sorted(paths)]
        return [*norms, self.model.get_submodule(self._family.final_norm)]

    @property
    def embedding(self) -> Float[Tensor, "vocabulary d_model"]:
        """Vector that each token writes to the residual stream."""
        return _weight(self.model.get_input_embeddings())

    @property
    def positions(self) -> Float[Tensor, "position d_model"]:
        """Vector that each position writes to it, in a model with a table of positions."""
        return _weight(self.model.get_submodule("transformer.wpe"))

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary d_model"]:
        """Vector that the logit of each token reads."""
        return _weight(self.model.get_output_embeddings())

    @property
    def heads_per_group(self) -> int:
        """Number of heads that share a key and a value."""
        return self._readers[0].n_heads // self._readers[0].n_kv_heads

    def query(self, layer: int, head: int) -> Affine:
        """Map from the residual stream to a head's query."""
        return self._reader(layer, 0, head)

    def key(self, layer: int, head: int) -> Affine:
        """Map from the residual stream to the key of a head, and of those that share it."""
        return self._reader(layer, 1, head // self.heads_per_group)

    def value(self, layer: int, head: int) -> Affine:
        """Map from the residual stream to the value of a head, and of those that share it."""
        return self._reader(layer, 2, head // self.heads_per_group)

    def _reader(self, layer: int, kind: int, number: int) -> Affine:
        readers = self._readers[layer]
        maps = [_affine(module) for module in readers.modules]
        weights = readers.by_reader([projection.weight for projection in maps])
        biases = readers.by_reader([projection.bias for projection in maps])
        return Affine(weights[kind][number], biases[kind][number])

    def output(self, layer: int, head: int) -> Float[Tensor, "d_model d_head"]:
        """Map from a head's value to the residual stream."""
        sizes = self.parts.dimensions
        whole = _weight(self.parts.attention_outputs[layer])
        by_head: Tensor = whole.unflatten(1, (sizes.n_heads, sizes.d_head))[:, head]
        return by_head

    def add_units(
        self,
        layer: int,
        reads: Float[Tensor, "unit d_model"],
        biases: Float[Tensor, " unit"],
        writes: Float[Tensor, "unit d_model"],
    ) -> None:
        """Add rectified units to an MLP: each writes relu(read * residual + bias) times its vector.

        Raises:
            ValueError: the MLP has too few unused units.
        """
        mlp, (read, write, gate) = self.parts.mlps[layer], self._mlp_names
        into = _affine(mlp.get_submodule(read))
        start = self._used_units[layer]
        used = slice(start, start + len(reads))
        if used.stop > len(into.bias):
            raise ValueError(f"The MLP of layer {layer} has {len(into.bias)} units, {used.stop} are asked for.")
        self._used_units[layer] = used.stop
        scale = STEEP if gate else 1.0
        into.weight[used] = scale * reads
        into.bias[used] = scale * biases
        if gate:
            _affine(mlp.get_submodule(gate)).bias[used] = 1 / STEEP
        _weight(mlp.get_submodule(write))[:, used] = writes.T

    def balance(self, coordinate: int) -> None:
        """Give everything written to the residual stream a mean of zero over its dimensions.

        A LayerNorm, which subtracts the mean, then changes nothing, whichever writes are removed or replaced by other
        writes of the model. The dimension `coordinate`, which nothing reads, is changed for it.
        """
        tables = [self.embedding.T]
        if self.model.config.model_type == "gpt2":
            tables.append(self.positions.T)
        for attention, mlp in zip(self.parts.attention_outputs, self.parts.mlps, strict=True):
            tables += [_weight(attention), _weight(mlp.get_submodule(self._mlp_names[1]))]
        for table in tables:
            table[coordinate] -= table.sum(dim=0)


def _weight(module: nn.Module) -> Float[Tensor, "out into"]:
    # An embedding has a row for each entry already.
    if isinstance(module, nn.Embedding):
        return module.weight.detach()
    return weight_and_bias(module)[0].detach()


def _affine(module: nn.Module) -> Affine:
    return Affine(_weight(module), module.get_parameter("bias").detach())
