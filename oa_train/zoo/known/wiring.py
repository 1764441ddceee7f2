"""Heads and units from which hand-written models are put together: what reads which subspace, and writes which."""

from collections.abc import Sequence

import torch

from oa_train.models.loading import CausalLM
from oa_train.shapes import Float, Int, Tensor
from oa_train.zoo.known.subspaces import Subspaces
from oa_train.zoo.known.weights import HandWrittenWeights

# By how much the attention score of the token that a head looks for exceeds every other: of its attention the others
# get less than one part in ten millions.
SHARPNESS = 20.0

# Pairs of rotated dimensions that turn by more than this, in radians a position, tell positions apart; those that turn
# by less than a tenth of it are as good as still over a prompt.
TURNING = 0.05


class Wiring:
    """Writes heads and units between named subspaces of a model's residual stream.

    Args:
        model: its weights are overwritten.
        spaces: names for the dimensions of its residual stream.
    """

    def __init__(self, model: CausalLM, spaces: Subspaces) -> None:
        self.weights = HandWrittenWeights(model)
        self.spaces = spaces
        self.d_head = self.weights.parts.dimensions.d_head
        self._frequencies = _frequencies(model)
        # Which dimensions of a value carry which subspace, for every layer and every group that shares the value.
        self._values: dict[tuple[int, int], dict[str, slice]] = {}

    def vector(self, space: str, number: int = 0) -> Float[Tensor, " d_model"]:
        """A basis vector of the residual stream: dimension `number` of a subspace."""
        return self.basis(space)[number]

    def basis(self, space: str) -> Float[Tensor, "entry d_model"]:
        """All basis vectors of a subspace, one in each row."""
        return torch.eye(self.spaces.width)[self.spaces[space]]

    def copy(self, layer: int, head: int, source: str, into: str) -> None:
        """Let a head copy a subspace of the tokens that it attends to into the first dimensions of another."""
        self.tell(layer, head, source, self.basis(into)[: self.spaces.size(source)])

    def tell(self, layer: int, head: int, source: str, written: Float[Tensor, "entry d_model"]) -> None:
        """Let a head write a vector for each dimension of a subspace of the tokens that it attends to."""
        rows = self._carrying(layer, head, source)
        self.weights.value(layer, head).weight[rows] = self.basis(source)
        self.weights.output(layer, head)[:, rows] = written.T

    def _carrying(self, layer: int, head: int, source: str) -> slice:
        """Dimensions of a head's value for a subspace; heads that share the value share them."""
        carried = self._values.setdefault((layer, head // self.weights.heads_per_group), {})
        if source not in carried:
            start = max((rows.stop for rows in carried.values()), default=0)
            carried[source] = slice(start, start + self.spaces.size(source))
        return carried[source]

    def match(self, layer: int, head: int, pairs: Sequence[tuple[str, str]]) -> None:
        """Let a head attend to tokens of which a subspace equals a subspace of the token that asks.

        Args:
            layer: of the head.
            head: its number.
            pairs: one-hot subspaces that query and key read; their scores are added up.
        """
        query, key, free = self.weights.query(layer, head), self.weights.key(layer, head), self._still()
        for asked, offered in pairs:
            width = self.spaces.size(asked)
            rows, free = free[:width], free[width:]
            query.weight[rows] = self._score_size(1.0) * self.basis(asked)
            key.weight[rows] = self._score_size(1.0) * self.basis(offered)

    def look_back(self, layer: int, head: int, back: int) -> None:
        """Let a head attend to the token `back` positions before its own.

        With rotary embeddings a constant query and a constant key do so, and neither reads anything of the residual
        stream; else they read one-hot positions in the subspace `position`.
        """
        if len(self._frequencies):
            self._look_back_by_rotation(layer, head, back)
            return
        query, key = self.weights.query(layer, head), self.weights.key(layer, head)
        positions = self._score_size(1.0) * self.basis("position")
        key.weight[: len(positions)] = positions
        query.weight[: len(positions) - back] = positions[back:]

    def _look_back_by_rotation(self, layer: int, head: int, back: int) -> None:
        query, key = self.weights.query(layer, head), self.weights.key(layer, head)
        turning = (self._frequencies > TURNING).nonzero().flatten()
        partners = turning + len(self._frequencies)
        angles = -back * self._frequencies[turning]
        # A position beside the right one scores less by a cosine in every pair.
        size = self._score_size(float((1 - self._frequencies[turning].cos()).sum()))
        key.bias[turning] = size
        query.bias[turning], query.bias[partners] = size * angles.cos(), size * angles.sin()

    def _score_size(self, product: float) -> float:
        """Factor of query and key by which a product of the two becomes a score of `SHARPNESS`."""
        return float((SHARPNESS * self.d_head**0.5 / product) ** 0.5)

    def _still(self) -> Int[Tensor, " entry"]:
        """Dimensions of a query that its position does not turn."""
        n_pairs = len(self._frequencies)
        slow = (self._frequencies < TURNING / 10).nonzero().flatten()
        return torch.cat([slow, slow + n_pairs, torch.arange(2 * n_pairs, self.d_head)])

    def add_units(self, layer: int, reads: Sequence[Tensor], writes: Sequence[Tensor], bias: float = 0.0) -> None:
        """Add rectified units to an MLP.

        Args:
            layer: of the MLP.
            reads: direction [d_model] that each unit reads.
            writes: what each writes.
            bias: added before rectifying, the same for all.
        """
        biases = torch.full((len(reads),), bias)
        self.weights.add_units(layer, torch.stack(list(reads)), biases, torch.stack(list(writes)))

    def write_positions(self) -> None:
        """Give every position of a table of positions a dimension of `position`."""
        self.weights.positions[:] = self.basis("position")

    def finish(self) -> CausalLM:
        """Balance what is written, and hand out the model."""
        self.weights.balance(self.spaces.first("balance"))
        return self.weights.model


def _frequencies(model: CausalLM) -> Float[Tensor, " pair"]:
    """Radians a position by which each pair of a rotary model's query dimensions turns; empty for other models."""
    for module in model.modules():
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            return module.get_buffer("inv_freq").float()
    return torch.zeros(0)
