"""The edges of a model: which part writes to the residual stream what which part reads.

Sources stand in the order in which they write, readers in the order in which they read. What a reader sees therefore
is always a run of sources from the first one on, and the edges, reader by reader, need no search: an edge circuit of
GPT-2 XL has 2.2 million of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from oa_train.errors import ConfigurationError, UnknownNameError, nearest_names, unknown_name
from oa_train.models.selection import Components, matching
from oa_train.models.families import Dimensions, is_parallel
from oa_train.shapes import Bool, Int, Tensor

ARROW = "->"


@dataclass(frozen=True)
class Graph:
    """Sources, readers and edges of a decoder; an edge is called `source->reader`, as in `a0.h1->a3.h5<q>`.

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
        return _graph(sizes.n_layers, sizes.n_heads, n_kv_heads, is_parallel(config))

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
        return torch.arange(self.n_edges) - self.first_edge[self.edge_readers]

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

    def __len__(self) -> int:
        return self.n_edges

    def index(self, name: str) -> int:
        """Mask entry of an edge.

        Raises:
            UnknownNameError: the model has no edge of that name.
        """
        source, arrow, reader = name.partition(ARROW)
        if not arrow:
            raise UnknownNameError(f"There is no edge named {name!r}; an edge is called source{ARROW}reader.")
        if reader not in self._reader_indices:
            raise unknown_name("reader", reader, self.readers)
        number = self._reader_indices[reader]
        if source not in self._source_indices:
            raise unknown_name("source", source, self.sources)
        if self._source_indices[source] >= self.n_read[number]:
            raise unknown_name("edge", name, (f"{one}{ARROW}{reader}" for one in self.sources[: self.n_read[number]]))
        return int(self.first_edge[number]) + self._source_indices[source]

    def mask(self, names: Sequence[str]) -> Bool[Tensor, " edge"]:
        """A mask that keeps the named edges and cuts all others."""
        mask = torch.zeros(self.n_edges, dtype=torch.bool)
        mask[[self.index(name) for name in names]] = True
        return mask

    def kept(self, mask: Bool[Tensor, " edge"]) -> tuple[str, ...]:
        """Names of the edges that a mask keeps, in mask order."""
        numbers = mask.nonzero().flatten().cpu()
        pairs = zip(self.edge_sources[numbers].tolist(), self.edge_readers[numbers].tolist(), strict=True)
        return tuple(f"{self.sources[source]}{ARROW}{self.readers[reader]}" for source, reader in pairs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each mask entry."""
        return self.kept(torch.ones(self.n_edges, dtype=torch.bool))

    def select(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """Names of edges whose source and reader match shell patterns, in mask order.

        Args:
            patterns: `a*.h*->logits`, `input->a3.*<v>`; without an arrow a pattern is of sources; a source pattern
                `a3` is for all heads of layer 3; a leading `!` takes out what the patterns before it put in.

        Raises:
            ConfigurationError: a pattern matches nothing.
        """
        chosen = torch.zeros(self.n_edges, dtype=torch.bool)
        for pattern in patterns:
            matched = self._matched(pattern.removeprefix("!"))
            if not matched.any():
                names = (*self.sources, *self.readers)
                raise ConfigurationError(
                    f"The pattern {pattern!r} matches no edge (source{ARROW}reader). {nearest_names(pattern, names)}"
                )
            chosen = chosen & ~matched if pattern.startswith("!") else chosen | matched
        return self.kept(chosen)

    def _matched(self, pattern: str) -> Bool[Tensor, " edge"]:
        from_source, _, to_reader = pattern.partition(ARROW)
        sources, readers = (
            torch.tensor(matching(names, wanted))
            for names, wanted in ((self.sources, from_source), (self.readers, to_reader or "*"))
        )
        return sources[self.edge_sources] & readers[self.edge_readers]

    def nodes(self, mask: Bool[Tensor, " edge"]) -> tuple[str, ...]:
        """Names of the components that edges lead out of, in the order of a node mask."""
        used = torch.zeros(self.n_sources, dtype=torch.bool)
        used[self.edge_sources[mask.cpu()]] = True
        return tuple(name for name, one in zip(self.sources[1:], used[1:].tolist(), strict=True) if one)

    def node_edges(self, names: Sequence[str]) -> list[tuple[str, str, str]]:
        """Edges between nodes: what writes, what reads, and as what: `q`, `k`, `v` or nothing.

        Of heads that share a key or value those are given that write something in the circuit.

        Args:
            names: edges of a circuit.
        """
        alive = {name.partition(ARROW)[0] for name in names}
        per_group = self.n_heads // self.n_kv_heads
        found = []
        for name in names:
            source, _, reader = name.partition(ARROW)
            node, _, kind = reader.removesuffix(">").partition("<")
            layer, _, group = node.partition(".k")
            members = range(int(group) * per_group, (int(group) + 1) * per_group) if group else ()
            heads = [head for head in (f"{layer}.h{member}" for member in members) if head in alive]
            found += [(source, head, kind) for head in heads or [node]] if not group or heads else []
        return found

    @cached_property
    def edges_at_heads(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Edges that leave or enter a head, and the number of that head.

        An edge between two heads stands here twice, and one into a key or value that several heads share once for
        each of them.
        """
        heads = torch.arange(self.n_layers * self.n_heads).view(self.n_layers, self.n_heads)
        per_group = self.n_heads // self.n_kv_heads
        of_source = torch.full((self.n_sources,), -1)
        of_source[1:].view(self.n_layers, -1)[:, :-1] = heads
        pairs = [(self.edge_sources, of_source)]
        for member in range(per_group):  # the how many-th head of its group; queries have one head only
            by_group = heads.view(self.n_layers, self.n_kv_heads, per_group)[..., member]
            queries = heads if member == 0 else torch.full_like(heads, -1)
            mlps = torch.full((self.n_layers, 1), -1)
            of_reader = torch.cat([queries, by_group, by_group, mlps], dim=1).flatten()
            pairs.append((self.edge_readers, torch.cat([of_reader, of_reader.new_tensor([-1])])))
        by_edge = [heads_of[ends] for ends, heads_of in pairs]
        edges = torch.cat([(found >= 0).nonzero().flatten() for found in by_edge])
        return edges, torch.cat([found[found >= 0] for found in by_edge])

    @cached_property
    def first_edge(self) -> Int[Tensor, " reader"]:
        """Number of each reader's first edge."""
        return self.n_read.cumsum(dim=0) - self.n_read

    @cached_property
    def _source_indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.sources)}

    @cached_property
    def _reader_indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.readers)}


@cache
def _graph(n_layers: int, n_heads: int, n_kv_heads: int, parallel: bool) -> Graph:
    """One object for all who ask, because its arrays of edges are long."""
    return Graph(n_layers, n_heads, n_kv_heads, parallel)
