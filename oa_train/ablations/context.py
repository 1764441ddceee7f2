"""A model that runs as its circuit, for the length of a context."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import torch

from oa_train.ablations.constants import Constants
from oa_train.circuits.circuit import Circuit
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.engine.forward import masks_within_single_precision, protected
from oa_train.engine.levels import masked_call
from oa_train.models.selection import Components
from oa_train.models.families import Dimensions
from oa_train.models.graph import Graph
from oa_train.models.loading import CausalLM, fingerprint
from oa_train.models.taps import replaced_forwards
from oa_train.shapes import Tensor


@contextmanager
def ablated(model: CausalLM, circuit: Circuit, constants: Constants) -> Iterator[CausalLM]:
    """Run a model as a circuit: every component outside of it is replaced by its constant, every other edge is cut.

    Everything that calls the model works inside the context, `generate` with its key-value cache included. The model
    is as before afterwards, also when something raises.

    Args:
        model: frozen causal language model.
        circuit: the components or edges that are kept.
        constants: what stands in for the others.

    Yields:
        The same model.

    Raises:
        ArtefactError: circuit or constants belong to another model.
    """
    check_belongs(model, circuit, constants)
    mask = circuit.mask.to(model.device, torch.float32).unsqueeze(0)
    there, forward = constants.to(model.device), model.forward
    parameters = signature(forward)

    @wraps(forward)
    def masked_forward(*args: Any, **kwargs: Any) -> Any:
        tokens, positions = _tokens_and_positions(dict(parameters.bind(*args, **kwargs).arguments))
        kept = protected(tokens, positions, there.bos_token_id)
        with masked_call(model, mask.expand(len(tokens), -1), there.replacements_at(positions), kept):
            return forward(*args, **kwargs)

    with masks_within_single_precision(model), replaced_forwards([(model, masked_forward)]):
        yield model


def _tokens_and_positions(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    tokens = arguments.get("input_ids")
    if tokens is None:
        raise ConfigurationError("Inside `ablated` the model is called with input_ids; inputs_embeds has no tokens.")
    past = arguments.get("past_key_values")
    seen = past.get_seq_length() if past is not None else 0
    attention_mask = arguments.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        counted = attention_mask.long().cumsum(dim=1) - 1
        return tokens, counted[:, seen : seen + tokens.shape[1]].clamp(min=0)
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor):  # a static cache brings a mask of four dimensions; its positions still count
        return tokens, positions.expand(len(tokens), -1)
    if attention_mask is not None:
        raise ConfigurationError(
            "Inside `ablated` an attention mask has two dimensions, [row, position], unless position_ids are given."
        )
    columns = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)
    return tokens, columns.expand(len(tokens), -1)


def check_belongs(model: CausalLM, circuit: Circuit, constants: Constants | None) -> None:
    """Check that a circuit, and constants if there are any, were made for a model.

    Raises:
        ArtefactError: their sizes or fingerprints are another model's.
    """
    dimensions = Dimensions.of(model.config)
    own: Components | Graph = Graph.of(model.config) if circuit.of_edges else Components.of(dimensions)
    if circuit.parts != own:
        raise ArtefactError(f"The circuit is of a model with {_said(circuit.parts)}; this one has {_said(own)}.")
    _check_fingerprint(model, "circuit", circuit.provenance)
    if constants is None:
        return
    expected = (dimensions.n_layers, dimensions.n_heads, dimensions.d_head, dimensions.d_model)
    given = (constants.heads.shape[0], *constants.heads.shape[2:], constants.mlps.shape[-1])
    if given != expected:
        raise ArtefactError(
            f"The constants have sizes {given} (layers, heads, d_head, d_model); the model {expected}."
        )
    _check_fingerprint(model, "constants", constants.provenance)


def _said(parts: Components | Graph) -> str:
    groups = f" and {parts.n_kv_heads} key-value heads" if isinstance(parts, Graph) else ""
    parallel = ", attention and MLP in parallel" if isinstance(parts, Graph) and parts.parallel else ""
    return f"{parts.n_layers} layers of {parts.n_heads} heads{groups}{parallel}"


def _check_fingerprint(model: CausalLM, what: str, provenance: Mapping[str, Any]) -> None:
    wanted = provenance.get("fingerprint")
    if wanted is not None and wanted != fingerprint(model):
        name = provenance.get("model", "another model")
        raise ArtefactError(f"The {what} belongs to {name} (fingerprint {wanted}); this is {fingerprint(model)}.")
