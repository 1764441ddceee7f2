"""Circuits from the literature, by the names of their parts."""

from collections.abc import Iterator, Sequence

from oa_train.circuits.circuit import Circuit
from oa_train.errors import ConfigurationError
from oa_train.models.graph import ARROW, Graph

# Layers, heads, key-value heads, and whether attention and MLP run in parallel.
GPT2_SMALL = (12, 12, 12, False)


def _heads(numbers: str) -> tuple[str, ...]:
    """Names of heads that the paper writes as `layer.head`."""
    pairs = (number.split(".") for number in numbers.split())
    return tuple(f"a{layer}.h{head}" for layer, head in pairs)


NAME_MOVERS = _heads("9.9 10.0 9.6")
BACKUP_NAME_MOVERS = _heads("10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9")
NEGATIVE_NAME_MOVERS = _heads("10.7 11.10")
S_INHIBITION = _heads("7.3 7.9 8.6 8.10")
INDUCTION = _heads("5.5 5.8 5.9 6.9")
DUPLICATE_TOKEN = _heads("0.1 0.10 3.0")
PREVIOUS_TOKEN = _heads("2.2 4.11")

MOVERS = (*NAME_MOVERS, *BACKUP_NAME_MOVERS, *NEGATIVE_NAME_MOVERS)
ALL_HEADS = (*MOVERS, *S_INHIBITION, *INDUCTION, *DUPLICATE_TOKEN, *PREVIOUS_TOKEN)


def published_ioi_circuit(graph: Graph) -> Circuit:
    """The circuit of indirect object identification in GPT-2 small, as 963 of its 32,491 edges.

    The heads and their roles are those of Wang et al. 2023, "Interpretability in the Wild: a Circuit for Indirect
    Object Identification in GPT-2 Small", turned into edges as in Li & Janson 2024, "Optimal ablation for
    interpretability", who keep all MLPs. No edge is dangling. The circuit comes without constants; `fit_constants`
    and `compare` train them.

    Raises:
        ConfigurationError: the graph is not that of GPT-2 small.
    """
    if (graph.n_layers, graph.n_heads, graph.n_kv_heads, graph.parallel) != GPT2_SMALL:
        raise ConfigurationError(
            f"The published circuit is for GPT-2 small: 12 layers of 12 heads, each with its own key and value, "
            f"attention before the MLP. This graph has {graph.n_layers} layers of {graph.n_heads} heads, "
            f"{graph.n_kv_heads} keys and values{' and MLPs in parallel' if graph.parallel else ''}."
        )
    pairs = [(frozenset(sources), frozenset(readers)) for sources, readers in _rules(graph)]
    ends = ((name, *name.split(ARROW)) for name in graph.names)
    names = tuple(
        name
        for name, source, reader in ends
        if any(source in sources and reader in readers for sources, readers in pairs)
    )
    return Circuit(graph, names, provenance={"source": "Wang et al. 2023, Li & Janson 2024"})


def _rules(graph: Graph) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Pairs of sources and readers; the circuit has every edge from one of the sources to one of the readers."""
    mlps = [f"m{layer}" for layer in range(graph.n_layers)]
    yield ["input", *mlps], [*mlps, "logits"]
    yield ALL_HEADS, mlps
    yield mlps, _reading(ALL_HEADS, "qkv")
    yield ["input"], _reading((*S_INHIBITION, *DUPLICATE_TOKEN, *PREVIOUS_TOKEN), "q")
    yield ["input"], _reading((*MOVERS, *PREVIOUS_TOKEN, *DUPLICATE_TOKEN), "kv")
    yield MOVERS, ["logits"]
    yield S_INHIBITION, _reading(MOVERS, "q")
    yield (*DUPLICATE_TOKEN, *INDUCTION), _reading(S_INHIBITION, "kv")
    yield PREVIOUS_TOKEN, _reading(INDUCTION, "kv")


def _reading(heads: Sequence[str], kinds: str) -> list[str]:
    """Names of the queries (q), keys (k) and values (v) of heads."""
    return [f"{head}<{kind}>" for head in heads for kind in kinds]
