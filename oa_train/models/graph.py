"""The level of edges: the graph of a decoder's sources and readers, with names."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from typing import Any

import torch
from torch.nn import functional as F

from oa_train.errors import ConfigurationError, UnknownNameError, nearest_names, unknown_name
from oa_train.models.edge_layout import EdgeLayout
from oa_train.models.families import check_config
from oa_train.models.levels import Level, ScoreMap
from oa_train.models.parts import Dimensions, n_kv_heads
from oa_train.models.pruning import within_budget, without_dangling
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site, matching
from oa_train.shapes import Bool, Float, Int, Tensor

ARROW = "->"


@dataclass(frozen=True)
class Graph(EdgeLayout, Level):
    """Sources, readers and edges of a decoder; an edge is named `source->reader`, as in `a0.h1->a3.h5<q>`.

    Sources are the embedding `input`, every head `a{layer}.h{head}` and every MLP `m{layer}`. Readers are the query
    of every head `a{layer}.h{head}<q>`, the key and the value of every key-value head `a{layer}.k{group}<k>` and
    `a{layer}.k{group}<v>` (`a{layer}.h{head}<k>` if each head has its own), every MLP `m{layer}`, and `logits`.

    Attributes:
        d_head: width of one head's value; 0 if only names matter.
        d_model: width of the residual stream; 0 if only names matter.
    """

    kind = "edges"
    part = "edge"
    has_one_stream = False

    d_head: int = 0
    d_model: int = 0

    @classmethod
    def of(cls, config: Any) -> "Graph":
        """The graph of a model with this Hugging Face configuration."""
        sizes = Dimensions.of(config)
        groups = n_kv_heads(config)
        return _graph(
            sizes.n_layers, sizes.n_heads, groups, check_config(config).parallel, sizes.d_head, sizes.d_model
        )

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources in writing order; source `i + 1` is entry `i` of a mask over heads and MLPs."""
        heads = range(self.n_heads)
        layers = ((*(f"a{layer}.h{head}" for head in heads), f"m{layer}") for layer in range(self.n_layers))
        return ("input", *itertools.chain(*layers))

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers in reading order: queries, keys, values and the MLP of each layer; then `logits`."""
        letter = "h" if self.n_kv_heads == self.n_heads else "k"
        of_attention = [f"h{head}<q>" for head in range(self.n_heads)]
        of_attention += [f"{letter}{group}<{kind}>" for kind in "kv" for group in range(self.n_kv_heads)]
        layers = ((*(f"a{layer}.{name}" for name in of_attention), f"m{layer}") for layer in range(self.n_layers))
        return (*itertools.chain(*layers), "logits")

    @cached_property
    def sites(self) -> Mapping[Site, tuple[int, int]]:
        """Sites of the sources in writing order, with number and width of their units."""
        sites = {Site("embedding"): (1, self.d_model)}
        for layer in range(self.n_layers):
            sites |= {Site("heads", layer): (self.n_heads, self.d_head), Site("mlp", layer): (1, self.d_model)}
        return sites

    def __len__(self) -> int:
        return self.n_edges

    def index(self, name: str) -> int:
        """Mask entry of an edge.

        Raises:
            UnknownNameError: the model has no edge of that name.
        """
        source, arrow, reader = name.partition(ARROW)
        if not arrow:
            raise UnknownNameError(f"There is no edge named {name!r}; an edge is named source{ARROW}reader.")
        for kind, end, indices in (("reader", reader, self._reader_indices), ("source", source, self._source_indices)):
            if end not in indices:
                raise unknown_name(kind, end, indices)
        source_index, reader_index = self._source_indices[source], self._reader_indices[reader]
        n_read = int(self.n_read[reader_index])
        if source_index >= n_read:
            raise unknown_name("edge", name, (f"{before}{ARROW}{reader}" for before in self.sources[:n_read]))
        return int(self.first_edge[reader_index]) + source_index

    @cached_property
    def _source_indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.sources)}

    @cached_property
    def _reader_indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.readers)}

    def kept(self, mask: Bool[Tensor, " edge"]) -> tuple[str, ...]:
        """Names of the edges that a mask keeps, in mask order."""
        numbers = mask.nonzero().flatten().cpu()
        pairs = zip(self.edge_sources[numbers].tolist(), self.edge_readers[numbers].tolist(), strict=True)
        return tuple(f"{self.sources[source]}{ARROW}{self.readers[reader]}" for source, reader in pairs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each mask entry."""
        return self.kept(torch.ones(self.n_edges, dtype=torch.bool))

    def matched(self, pattern: str) -> Bool[Tensor, " edge"]:
        """Edges whose source and reader match shell patterns: `a*.h*->logits`, `input->a3.*<v>`.

        A pattern without an arrow matches sources; `a3` stands for all heads of layer 3.

        Raises:
            ConfigurationError: the pattern matches nothing, or names a span, which edges do not have.
        """
        if "@" in pattern:
            raise ConfigurationError(
                f"The pattern {pattern!r} names a span. Spans are for circuits of nodes (level: nodes); an edge is "
                "kept or cut at every token."
            )
        from_source, _, to_reader = pattern.partition(ARROW)
        sources, readers = matching(self.sources, from_source), matching(self.readers, to_reader or "*")
        matched = sources[self.edge_sources] & readers[self.edge_readers]
        if not matched.any():
            names = (*self.sources, *self.readers)
            raise ConfigurationError(
                f"The pattern {pattern!r} matches no edge (source{ARROW}reader). {nearest_names(pattern, names)}"
            )
        return matched

    def prune(self, kept: Bool[Tensor, "row entry"]) -> Bool[Tensor, "row entry"]:
        """A new mask without dangling edges, separately in each row."""
        return without_dangling(self, kept)

    def _largest(self, scores: Float[Tensor, " entry"], size: int) -> Bool[Tensor, " entry"]:
        return within_budget(self, scores, size)

    def replaced(self, masks: Bool[Tensor, "circuit entry"]) -> dict[Site, Bool[Tensor, "circuit slot unit"]]:
        """For each circuit, the sources with an edge that it cuts."""
        cut = torch.zeros(len(masks), self.n_sources, dtype=torch.int, device=masks.device)
        cut.index_add_(1, self.edge_sources.to(masks.device), (~masks).int())
        by_site = (cut > 0).split([n_units for n_units, _ in self.sites.values()], dim=1)
        return {site: units.unsqueeze(1) for site, units in zip(self.sites, by_site, strict=True)}

    def nodes(self, mask: Bool[Tensor, " edge"]) -> tuple[str, ...]:
        """Names of the components with an outgoing edge, in the order of the sources."""
        used = self.edge_sources[mask.cpu()].unique().tolist()
        return tuple(self.sources[number] for number in used if number)

    def node_level(self, config: Any) -> Level:
        """The heads and MLPs of the model."""
        return Nodes.of(config)

    def counts(self, mask: Bool[Tensor, " entry"]) -> dict[str, int]:
        """Number of kept edges, of all edges, and of the nodes with an outgoing edge."""
        nodes = {"nodes": len(self.nodes(mask)), "nodes_total": self.n_sources - 1}
        return nodes | {"edges": int(mask.sum()), "edges_total": self.n_edges}

    @cached_property
    def entry_kinds(self) -> tuple[tuple[str, ...], Int[Tensor, " entry"]]:
        """Kinds of source, and the index of the kind of each edge's source."""
        kinds = ("embedding", "heads", "mlp")
        of_source = [kinds.index(site.kind) for site, (n_units, _) in self.sites.items() for _ in range(n_units)]
        return kinds, torch.tensor(of_source)[self.edge_sources]

    def arrows(self, mask: Bool[Tensor, " entry"]) -> list[tuple[str, str, str]] | None:
        """Edges between nodes: source, reader, and `q`, `k`, `v` or an empty string.

        Of heads that share a key or value, only those with an outgoing edge in the circuit are listed.
        """
        edges = [name.split(ARROW) for name in self.kept(mask)]
        alive = {source for source, _ in edges}
        per_group = self.n_heads // self.n_kv_heads
        arrows = []
        for source, reader in edges:
            node, _, kind = reader.removesuffix(">").partition("<")
            layer, _, group = node.partition(".k")
            members = range(int(group) * per_group, (int(group) + 1) * per_group) if group else ()
            heads = [head for head in (f"{layer}.h{member}" for member in members) if head in alive]
            arrows += [(source, head, kind) for head in (heads if group else [node])]
        return arrows

    @property
    def grid(self) -> tuple[int, int] | None:
        """Number of layers, and of heads in a layer."""
        return self.n_layers, self.n_heads

    def score_map(self, scores: Float[Tensor, " entry"]) -> ScoreMap:
        """A row for each reader, a column for each source."""
        table = torch.full((self.n_readers, self.n_sources), torch.nan)
        table[self.edge_readers, self.edge_sources] = scores.float().cpu()
        return ScoreMap(table, self.readers, self.sources, "reader", "source")

    def entries_at_nodes(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], int] | None:
        """Edges that leave or enter a head, the index of that head, and the number of heads.

        An edge between two heads occurs twice; one into a shared key or value, once for each head that shares it.
        """
        return *self._edges_at_heads, self.n_layers * self.n_heads

    @cached_property
    def _edges_at_heads(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        heads = torch.arange(self.n_layers * self.n_heads).view(self.n_layers, self.n_heads)
        no_heads, per_group = torch.full_like(heads, -1), self.n_heads // self.n_kv_heads
        of_source = torch.full((self.n_sources,), -1)
        of_source[1:].view(self.n_layers, -1)[:, :-1] = heads
        of_ends = [of_source[self.edge_sources]]
        for member, of_groups in enumerate(heads.unflatten(1, (-1, per_group)).unbind(2)):
            queries = no_heads if member else heads  # queries are never shared
            of_reader = torch.cat([queries, of_groups, of_groups, no_heads[:, :1]], dim=1).flatten()
            of_ends.append(F.pad(of_reader, (0, 1), value=-1)[self.edge_readers])
        edges = torch.cat([(of_end >= 0).nonzero().flatten() for of_end in of_ends])
        return edges, torch.cat([of_end[of_end >= 0] for of_end in of_ends])

    def of_model(self, config: Any) -> "Graph":
        """The graph of a model with this Hugging Face configuration."""
        return self.of(config)

    def header(self) -> dict[str, Any]:
        """Plain values from which `from_header` rebuilds this graph."""
        return {"level": self.kind, **asdict(self)}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> "Graph":
        """The graph that `header` describes."""
        return _graph(*(header[field.name] for field in fields(cls)))

    def describe(self) -> str:
        """Sizes of the model, in words."""
        parallel = ", attention and MLP in parallel" if self.parallel else ""
        return f"{self.n_layers} layers of {self.n_heads} heads and {self.n_kv_heads} key-value heads{parallel}"


# Cached, because a graph's arrays of edges are long.
_graph = cache(Graph)
