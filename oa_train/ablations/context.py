"""A context in which a model runs as a circuit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import torch

from oa_train.ablations.constants import Constants
from oa_train.batches import TokenLayout, leading_tokens
from oa_train.circuits.circuit import Circuit
from oa_train.engine.forward import as_written
from oa_train.engine.levels import masked_call
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.models.frozen import CausalLM
from oa_train.models.hooks import replaced_attributes
from oa_train.models.parts import find_parts
from oa_train.models.weights import fingerprint
from oa_train.shapes import Bool, Tensor

Spans = Mapping[str, Bool[Tensor, "row position"]]


@contextmanager
def ablated(model: CausalLM, circuit: Circuit, constants: Constants, spans: Spans | None = None) -> Iterator[CausalLM]:
    """Run a model as a circuit inside the context: entries that the circuit does not keep are replaced by constants.

    Anything may call the model, including `generate` with its key-value cache. At tokens that `generate` adds, only
    entries without a span are replaced. The model is restored afterwards, even after an exception.

    Args:
        model: frozen causal language model.
        circuit: the entries that are kept.
        constants: replacements of the others; their provenance names the token that is protected at the start.
        spans: tokens of the spans in the circuit's entries, for the prompts that the model is called with; not needed
            for `-1`, the last token of each prompt.

    Raises:
        ModelError: the family is not in the table, or the model is compiled as a whole.
        ArtefactError: the circuit or the constants belong to another model.
        ConfigurationError: a call has no token ids, or asks for hidden states of a circuit of edges.
        TaskError: a span is missing, or overlaps another span of the same unit.
    """
    find_parts(model)
    check_belongs(model, circuit, constants)
    with as_written(model):
        call = _Calls(model, circuit, constants.to(model.device), spans or {})
        with replaced_attributes(model, forward=call.forward, generate=call.generate):
            yield model


class _Calls:
    """A model's `forward` and `generate` inside `ablated`."""

    def __init__(self, model: CausalLM, circuit: Circuit, constants: Constants, spans: Spans) -> None:
        forward: Any = model.forward
        generate: Any = model.generate
        self._model, self._circuit, self._constants, self._spans = model, circuit, constants, spans
        self._mask = circuit.mask.to(model.device, torch.float32).unsqueeze(0)
        self._token_id = constants.provenance.get("bos_token_id")
        self._forward, self._generate = forward, generate
        self._parameters = signature(forward)
        self._prompt_width: int | None = None  # not None inside `generate`
        self.forward = _in_place_of(forward, self._masked_forward)
        self.generate = _in_place_of(generate, self._masked_generate)

    def _masked_generate(self, *args: Any, **kwargs: Any) -> Any:
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self._prompt_width = prompt.shape[1] if isinstance(prompt, Tensor) else None
        try:
            return self._generate(*args, **kwargs)
        finally:
            self._prompt_width = None

    def _masked_forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self._parameters.bind(*args, **kwargs).arguments)
        layout = self._layout(arguments)
        mask, values = self._mask.expand(len(layout.positions), -1), self._constants.at(layout.positions)
        with masked_call(self._model, self._circuit.level, mask, values, layout):
            return self._forward(*args, **kwargs)

    def _layout(self, arguments: dict[str, Any]) -> TokenLayout:
        tokens, positions, seen, real = _tokens_and_positions(arguments)
        protected = leading_tokens(tokens, positions, self._token_id)
        layout = TokenLayout(positions, real, protected, {}, continued=seen > 0)
        names = [name for name in self._circuit.level.spans if name is not None]
        if not names:
            return layout
        width = self._prompt_width or tokens.shape[1]
        spans = {name: self._span(name, layout, seen, width) for name in names}
        return TokenLayout(positions, real, protected, spans, continued=True)

    def _span(self, name: str, layout: TokenLayout, seen: int, width: int) -> Bool[Tensor, "row position"]:
        """Tokens of this call that belong to a span of the prompt; generated tokens never do."""
        inside = torch.zeros_like(layout.real)
        if seen >= width:
            return inside
        prompt = slice(0, width - seen)
        named = {}
        if name in self._spans:
            rows = self._spans[name].to(inside.device)
            named[name] = rows.repeat_interleave(len(inside) // len(rows), dim=0)[:, seen:width]  # beams
        inside[:, prompt] = TokenLayout(
            layout.positions[:, prompt], layout.real[:, prompt], layout.protected[:, prompt], named, layout.continued
        ).span(name)
        return inside


def _in_place_of(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """The method wrapped in a function with the signature of the original."""

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


def _tokens_and_positions(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, int, Tensor]:
    """Token ids of a call, their positions, the number of tokens in the cache, and which tokens are real."""
    tokens = arguments.get("input_ids")
    if tokens is None:
        raise ConfigurationError("Inside `ablated` the model is called with input_ids; inputs_embeds has no tokens.")
    past = arguments.get("past_key_values")
    seen = int(past.get_seq_length()) if past is not None else 0
    real = torch.ones_like(tokens, dtype=torch.bool)
    attention_mask = arguments.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        called = slice(seen, seen + tokens.shape[1])
        counted = attention_mask.long().cumsum(dim=1) - 1
        return tokens, counted[:, called].clamp(min=0), seen, attention_mask[:, called].bool()
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor):  # with a static cache, whose mask has four dimensions
        return tokens, positions.expand(len(tokens), -1), seen, real
    if attention_mask is not None:
        raise ConfigurationError(
            "Inside `ablated` an attention mask has two dimensions, [row, position], unless there are position_ids."
        )
    columns = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)
    return tokens, columns.expand(len(tokens), -1), seen, real


def check_belongs(model: CausalLM, circuit: Circuit, constants: Constants | None) -> None:
    """Raise an `ArtefactError` if the circuit or the constants belong to another model."""
    own = circuit.level.of_model(model.config)
    if circuit.level != own:
        raise ArtefactError(
            f"The circuit is of a model with {circuit.level.describe()}; this one has {own.describe()}."
        )
    check_fingerprint(model, "The circuit belongs", circuit.provenance)
    if constants is not None:
        constants.check_fits(circuit.level)
        check_fingerprint(model, "The constants belong", constants.provenance)


def check_fingerprint(model: CausalLM, belonging: str, provenance: Mapping[str, Any]) -> None:
    """Raise an `ArtefactError` that begins with `belonging` if the provenance is that of another model."""
    wanted = provenance.get("fingerprint")
    if wanted is not None and wanted != fingerprint(model):
        name = provenance.get("model", "another model")
        raise ArtefactError(f"{belonging} to {name} (fingerprint {wanted}); this is {fingerprint(model)}.")
