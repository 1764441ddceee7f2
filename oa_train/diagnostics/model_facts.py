"""Facts about a model from its configuration alone: parts, edges, trained parameters, memory of a training step."""

import math
import os
from dataclasses import asdict
from typing import Any

import torch

from oa_train.diagnostics.memory import StepSettings, node_step_memory
from oa_train.errors import ConfigurationError
from oa_train.models.families import check_family
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.loading import empty_model
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec

DEFAULT_TOKENS = 32


def model_facts(lm: LMSpec, settings: StepSettings) -> dict[str, Any]:
    """Gather the facts about a model that need no weights, as plain values by topic; sizes in bytes.

    `settings` are those of the training step whose memory is estimated.

    Raises:
        ModelError: the model does not exist, its family is not in the table, or the table's entry is wrong.
        ConfigurationError: the prompts have more tokens than the model has positions.
    """
    model = empty_model(lm)
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    if settings.n_tokens > longest:
        raise ConfigurationError(f"n_tokens is {settings.n_tokens}; this model has {longest} positions.")
    family, graph, memory = check_family(config.model_type), Graph.of(config), _memory(model, settings)
    dimensions, parameters = find_parts(model).dimensions, list(model.parameters())
    return {
        "model": {
            "name": lm.name,
            "revision": lm.revision,
            "family": family.model_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parallel": graph.parallel,
            "post_norms": family.post_norms,
        },
        "sizes": {
            "layers": graph.n_layers,
            "heads": graph.n_heads,
            "kv_heads": graph.n_kv_heads,
            "d_head": dimensions.d_head,
            "d_model": dimensions.d_model,
            "vocabulary": config.vocab_size,
        },
        "frozen": {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "bytes": sum(parameter.nbytes for parameter in parameters),
        },
        **_circuit_facts(model, graph, settings.n_tokens),
        "threads": {"used": torch.get_num_threads(), "cores": os.cpu_count()},
        "step": asdict(settings),
        "step_bytes": memory,
    }


def _circuit_facts(model: CausalLM, graph: Graph, n_tokens: int) -> dict[str, Any]:
    """Numbers of components, readers, sources and edges, and of the parameters that circuits train."""
    sizes = find_parts(model).dimensions
    components = Nodes.of(model.config)
    n_heads = graph.n_layers * graph.n_heads
    n_groups = graph.n_layers * graph.n_kv_heads
    node_constants = n_heads * sizes.d_head + graph.n_layers * sizes.d_model
    return {
        "components": {
            "count": len(components),
            "heads": n_heads,
            "mlps": graph.n_layers,
            "names": list(components.names),
        },
        "readers": {
            "count": graph.n_readers,
            "q": n_heads,
            "k": n_groups,
            "v": n_groups,
            "mlps": graph.n_layers,
            "logits": 1,
        },
        "sources": {"count": graph.n_sources, "input": 1, "heads": n_heads, "mlps": graph.n_layers},
        "edges": graph.n_edges,
        "node_circuit": _trained(len(components), node_constants, n_tokens),
        # Edges have the embedding as a source, which therefore has a constant as well.
        "edge_circuit": _trained(graph.n_edges, node_constants + sizes.d_model, n_tokens),
    }


def _trained(n_masks: int, n_constants: int, n_tokens: int) -> dict[str, int]:
    return {
        "masks": n_masks,
        "pooled_constants": n_constants,
        "total": n_masks + n_constants,
        "constants_by_position": n_constants * n_tokens,
        "total_by_position": n_masks + n_constants * n_tokens,
    }


def _memory(model: CausalLM, settings: StepSettings) -> dict[str, Any] | None:
    """Bytes of a step by purpose; None for mixtures of experts, whose shapes depend on the tokens."""
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        return None
    memory = node_step_memory(model, settings)
    return {**asdict(memory), "total": memory.total}
