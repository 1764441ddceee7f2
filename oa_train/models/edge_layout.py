"""The order of a decoder's edges, and the sources that each reader reads.

Sources are in the order in which they write, readers in the order in which they read. So each reader reads a prefix of
the sources, and with edges ordered by reader the index of an edge follows by arithmetic: no list of edges is needed,
of which GPT-2 XL has 2.2 million.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from oa_train.shapes import Int, Tensor


@dataclass(frozen=True)
class EdgeLayout:
    """Sources, readers and edges of a decoder, by index.

    A reader has an edge from every source that writes before it reads. Heads of the same layer do not read each other;
    an MLP reads the heads of its own layer, unless the two run in parallel.

    Attributes:
        n_layers: number of decoder blocks.
        n_heads: number of query heads of a block.
        n_kv_heads: number of key-value heads of a block; divides `n_heads`.
        parallel: True if attention and MLP of a block read the same residual stream.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False

    def sources_before(self, layer: int) -> int:
        """Number of sources that write before a layer; they are the first ones."""
        return 1 + layer * (self.n_heads + 1)

    @property
    def n_sources(self) -> int:
        """Number of sources."""
        return self.sources_before(self.n_layers)

    @property
    def n_attention_readers(self) -> int:
        """Number of queries, keys and values of one layer."""
        return self.n_heads + 2 * self.n_kv_heads

    @property
    def n_readers(self) -> int:
        """Number of readers."""
        return self.n_layers * (self.n_attention_readers + 1) + 1

    @cached_property
    def n_read(self) -> Int[Tensor, " reader"]:
        """Number of sources that each reader reads; they are the first ones."""
        before = torch.tensor([[self.sources_before(layer)] for layer in range(self.n_layers)])
        by_attention = before.expand(-1, self.n_attention_readers)
        by_mlp = before + (0 if self.parallel else self.n_heads)
        return torch.cat([torch.cat([by_attention, by_mlp], dim=1).flatten(), torch.tensor([self.n_sources])])

    @cached_property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.n_read.sum())

    @cached_property
    def first_edge(self) -> Int[Tensor, " reader"]:
        """Index of each reader's first edge."""
        return self.n_read.cumsum(dim=0) - self.n_read

    @cached_property
    def edge_readers(self) -> Int[Tensor, " edge"]:
        """Reader of every edge, in ascending order; this defines the order of edges."""
        return torch.arange(self.n_readers).repeat_interleave(self.n_read)

    @cached_property
    def edge_sources(self) -> Int[Tensor, " edge"]:
        """Source of every edge, in ascending order for each reader."""
        return torch.arange(self.n_edges) - self.first_edge[self.edge_readers]
