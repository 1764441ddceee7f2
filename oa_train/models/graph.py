"""The edges of a model: which part writes to the residual stream what which part reads.

Sources stand in the order in which they write, readers in the order in which they read. What a reader sees therefore
is always a run of sources from the first one on, and the edges, reader by reader, need no search: an edge circuit of
GPT-2 XL has 2.2 million of them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from oa_train.models.components import Components
from oa_train.models.families import Dimensions, is_parallel
from oa_train.shapes import Int, Tensor


@dataclass(frozen=True)
class Graph:
    """Sources, readers and edges of a decoder.

    Sources are the embedding `input`, every head `a{layer}.h{head}` and every MLP `m{layer}`. Readers are the query
    of every head `a{layer}.h{head}<q>`, the key and the value of every key-value head `a{layer}.k{group}<k>` and
    `a{layer}.k{group}<v>` (`a{layer}.h{head}<k>` where each head has its own), every MLP `m{layer}`, and `logits`.

    There is an edge from every source that is written before the reader reads. Heads of one layer do not read each
    other; an MLP reads the heads of its own layer, unless the two run in parallel.

    Attributes:
        n_layers: decoder blocks.
        n_heads: query heads of a block.
        n_kv_heads: key-value heads of a block; divides `n_heads`.
        parallel: whether attention and MLP of a block read the same residual stream.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False

    @classmethod
    def of(cls, config: Any) -> "Graph":
        """The graph of a model with this Hugging Face configuration.

        Raises:
            ModelError: its family is not in the table.
        """
        sizes = Dimensions.of(config)
        n_kv_heads = getattr(config, "num_key_value_heads", None) or sizes.n_heads
        return cls(sizes.n_layers, sizes.n_heads, n_kv_heads, is_parallel(config))

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names in the order of writing; source `i + 1` is entry `i` of a node mask."""
        return ("input", *Components(self.n_layers, self.n_heads).names)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names in the order of reading: for each layer all queries, all keys, all values, the MLP; then `logits`."""
        queries = [f"h{head}<q>" for head in range(self.n_heads)]
        kv_letter = "h" if self.n_kv_heads == self.n_heads else "k"
        keys_and_values = [f"{kv_letter}{group}<{kind}>" for kind in "kv" for group in range(self.n_kv_heads)]
        names: list[str] = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.{name}" for name in (*queries, *keys_and_values)]
            names.append(f"m{layer}")
        return (*names, "logits")

    @cached_property
    def n_read(self) -> Int[Tensor, " reader"]:
        """How many sources each reader reads: these are the first ones."""
        before_layer = 1 + torch.arange(self.n_layers) * (self.n_heads + 1)
        by_attention = before_layer.unsqueeze(1).expand(-1, self.n_heads + 2 * self.n_kv_heads)
        by_mlp = before_layer + (0 if self.parallel else self.n_heads)
        by_layer = torch.cat([by_attention, by_mlp.unsqueeze(1)], dim=1)
        return torch.cat([by_layer.flatten(), torch.tensor([self.n_sources])])

    @cached_property
    def edge_readers(self) -> Int[Tensor, " edge"]:
        """Reader of every edge, in ascending order; the one order of edges everywhere."""
        return torch.arange(self.n_readers).repeat_interleave(self.n_read)

    @cached_property
    def edge_sources(self) -> Int[Tensor, " edge"]:
        """Source of every edge, ascending within each reader."""
        first_edge = self.n_read.cumsum(dim=0) - self.n_read
        return torch.arange(self.n_edges) - first_edge[self.edge_readers]

    @property
    def n_sources(self) -> int:
        """Number of sources."""
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def n_readers(self) -> int:
        """Number of readers."""
        return self.n_layers * (self.n_heads + 2 * self.n_kv_heads + 1) + 1

    @cached_property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.n_read.sum())
