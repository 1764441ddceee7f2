"""Writes heads and units of hand-written models, each reading and writing subspaces of the residual stream."""

from collections.abc import Mapping, Sequence

import torch

from oa_train.models.frozen import CausalLM
from oa_train.shapes import Float, Int, Tensor
from oa_train.zoo.known.weights import HandWrittenWeights
from oa_train.zoo.tokenizer import BOS, SPECIAL

# Attention score of the token that a head looks for, where every other token has 0: all others together get less than
# one part in ten million of its attention.
SHARPNESS = 20.0

# Pairs of rotated dimensions that turn by more than this, in radians per position, distinguish positions; those that
# turn by less than a tenth of it hardly move over a prompt.
TURNING = 0.05

# Logit of the answer, where all other tokens have 0.
CONFIDENCE = 12.0


def subspaces(width: int, **sizes: int) -> dict[str, slice]:
    """Cut the dimensions of a residual stream into named subspaces, one after the other.

    Those of distractors (see `parts`) come after those in `sizes`, and the remaining dimensions are `rest`.

    Raises:
        ValueError: the subspaces do not fit in the residual stream.
    """
    sizes |= {"one": 1, "coin": 1, "sign": 1, "support": 1, "balance": 1}
    sizes["rest"] = width - sum(sizes.values())
    if sizes["rest"] < 0:
        raise ValueError(f"{width - sizes['rest']} dimensions do not fit in a space of {width}.")
    ends = torch.tensor(list(sizes.values())).cumsum(dim=0).tolist()
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


class Wiring:
    """Writes heads and units between named subspaces of a model's residual stream.

    Every word gets a dimension of `token`, 1 in `one`, a random sign in `coin` and random numbers in `rest`; among the
    special tokens only the BOS has a 1 in `one`. In a model with a table of positions, each gets a dimension of
    `position`. Half of the signs are positive, so that their mean is near zero.

    Args:
        model: its weights are overwritten.
        spaces: subspaces of its residual stream.
        words: the vocabulary, in the order of `token`.
        outputs: the words that can be answers, in the order of `output`, which their logits read.
        generator: source of all randomness.
    """

    def __init__(
        self,
        model: CausalLM,
        spaces: Mapping[str, slice],
        words: Sequence[str],
        outputs: Sequence[str],
        generator: torch.Generator,
    ) -> None:
        self.weights = HandWrittenWeights(model)
        self.spaces = spaces
        self.generator = generator
        self.d_head = self.weights.parts.dimensions.d_head
        self.written_heads: set[tuple[int, int]] = set()
        self._frequencies = _frequencies(model)
        # The dimensions of a value that carry a subspace, for every layer and every group of heads that share it.
        self._values: dict[tuple[int, int], dict[str, slice]] = {}
        self.weights.embedding[SPECIAL.index(BOS), spaces["one"]] = 1
        table = self.weights.embedding[len(SPECIAL) :]
        coins = torch.arange(len(words)) % 2 * 2.0 - 1
        table[:, spaces["token"]] = torch.eye(len(words))
        table[:, spaces["one"]] = 1
        table[:, spaces["coin"]] = coins[torch.randperm(len(words), generator=generator)].unsqueeze(1)
        table[:, spaces["rest"]] = 0.5 * torch.randn(len(words), self.size("rest"), generator=generator)
        if "position" in spaces:
            self.weights.positions[:] = self.basis("position")
        for number, word in enumerate(outputs):
            self.weights.unembedding[len(SPECIAL) + words.index(word)] = CONFIDENCE * self.vector("output", number)

    def size(self, space: str) -> int:
        """Number of dimensions of a subspace."""
        return len(self.basis(space))

    def vector(self, space: str, number: int = 0) -> Float[Tensor, " d_model"]:
        """A basis vector of the residual stream: dimension `number` of a subspace."""
        return self.basis(space)[number]

    def basis(self, space: str) -> Float[Tensor, "entry d_model"]:
        """All basis vectors of a subspace, as rows."""
        return torch.eye(self.weights.parts.dimensions.d_model)[self.spaces[space]]

    def group(self, layer: int, head: int) -> tuple[int, int]:
        """Layer, and index in it, of a head's key and value, which other heads may share."""
        return layer, head // self.weights.heads_per_group

    def copy(
        self,
        layer: int,
        head: int,
        source: str,
        into: str,
        back: int | None = None,
        where: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Let a head copy a subspace of the tokens that it attends to into the first dimensions of another.

        Unless it attends by other means, it looks `back` (see `look_back`) or to tokens `where` pairs of subspaces
        agree (see `match`).
        """
        if back is not None:
            self.look_back(layer, head, back)
        self.match(layer, head, where)
        self.tell(layer, head, source, self.basis(into)[: self.size(source)])

    def tell(self, layer: int, head: int, source: str, written: Float[Tensor, "entry d_model"]) -> None:
        """Let a head write a row of `written` for each dimension of a subspace of the tokens that it attends to."""
        carried = self._values.setdefault(self.group(layer, head), {})
        if source not in carried:
            start = max((rows.stop for rows in carried.values()), default=0)
            carried[source] = slice(start, start + self.size(source))
        self.weights.value(layer, head).weight[carried[source]] = self.basis(source)
        self.weights.output(layer, head)[:, carried[source]] = written.T
        self.written_heads.add((layer, head))

    def match(self, layer: int, head: int, pairs: Sequence[tuple[str, str]]) -> None:
        """Let a head attend to tokens in which one subspace equals another subspace of its own token.

        `pairs` are one-hot subspaces that query and key read; their scores are added up.
        """
        query, key, free = self.weights.query(layer, head), self.weights.key(layer, head), self._still()
        for asked, offered in pairs:
            rows, free = free.tensor_split([self.size(asked)])
            query.weight[rows] = self._score_size(1.0) * self.basis(asked)
            key.weight[rows] = self._score_size(1.0) * self.basis(offered)

    def look_back(self, layer: int, head: int, back: int) -> None:
        """Let a head attend to the token `back` positions before its own.

        With rotary embeddings a constant query and a constant key achieve this, and neither reads the residual stream;
        otherwise they read one-hot positions in the subspace `position`.
        """
        query, key = self.weights.query(layer, head), self.weights.key(layer, head)
        if not len(self._frequencies):
            positions = self._score_size(1.0) * self.basis("position")
            key.weight[: len(positions)] = positions
            query.weight[: len(positions) - back] = positions[back:]
            return
        turning = (self._frequencies > TURNING).nonzero().flatten()
        angles = -back * self._frequencies[turning]
        # In every pair of dimensions, the score of a neighbour of the right position is smaller by a cosine.
        size = self._score_size(float((1 - self._frequencies[turning].cos()).sum()))
        key.bias[turning] = size
        query.bias[turning], query.bias[turning + len(self._frequencies)] = size * angles.cos(), size * angles.sin()

    def rest_on_first(self, layer: int, head: int, hushed_by: str | None = None) -> None:
        """Let a head attend to the first token, the BOS, where nothing matches; it copies nothing from the BOS.

        The BOS has half the score of a match, and one and a half times that score if the subspace `hushed_by` of the
        head's own token holds a one-hot vector: then the head is silent even if something matches. For models with a
        table of positions.
        """
        query, key, dimension = self.weights.query(layer, head), self.weights.key(layer, head), self._still()[-1]
        key.weight[dimension] = self._score_size(1.0) * self.vector("position", 0)
        query.bias[dimension] = 0.5 * self._score_size(1.0)
        if hushed_by is not None:
            query.weight[dimension] = self._score_size(1.0) * self.basis(hushed_by).sum(dim=0)

    def _score_size(self, product: float) -> float:
        """Factor on both query and key that turns their product into a score of `SHARPNESS`."""
        return float((SHARPNESS * self.d_head**0.5 / product) ** 0.5)

    def _still(self) -> Int[Tensor, " entry"]:
        """Dimensions of a query that do not rotate with its position."""
        n_pairs = len(self._frequencies)
        slow = (self._frequencies < TURNING / 10).nonzero().flatten()
        return torch.cat([slow, slow + n_pairs, torch.arange(2 * n_pairs, self.d_head)])

    def add_units(self, layer: int, reads: Sequence[Tensor], writes: Sequence[Tensor], bias: float = 0.0) -> None:
        """Add rectified units to an MLP, all with the same bias, by `HandWrittenWeights.add_units`."""
        biases = torch.full((len(reads),), bias)
        self.weights.add_units(layer, torch.stack(list(reads)), biases, torch.stack(list(writes)))

    def finish(self) -> CausalLM:
        """Balance everything written to the residual stream, and return the model."""
        self.weights.balance(self.spaces["balance"].start)
        return self.weights.model


def _frequencies(model: CausalLM) -> Float[Tensor, " pair"]:
    """Radians per position by which each pair of a rotary model's query dimensions turns; empty for other models."""
    for module in model.modules():
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            return module.get_buffer("inv_freq").float()
    return torch.zeros(0)
