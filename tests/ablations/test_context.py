"""A model that runs as its circuit: calls and generation inside the context, and nothing of it afterwards."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.constants import Constants
from oa_train.ablations.context import ablated
from oa_train.circuits.circuit import Circuit
from oa_train.engine.forward import model_inputs
from oa_train.engine.levels import masked_logits
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.models.families import Dimensions
from oa_train.models.graph import Graph
from oa_train.models.loading import fingerprint
from oa_train.models.pruning import without_dangling
from oa_train.models.selection import Components
from tests.builders import BOS, batch_of, random_batch, random_constants, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}
COMPONENTS = Components(3, 4)
CIRCUIT = Circuit(COMPONENTS, ("a0.h0", "a0.h3", "m0", "a1.h2", "m1", "a2.h1", "m2"))
WHOLE = Circuit(COMPONENTS, COMPONENTS.names)
STEPS = 6
# Its attention takes the last columns of the cache for the newest, and in a static cache those are still empty.
WRONG_WITH_A_STATIC_CACHE = {"gpt_neo"}


def small_constants(model, n_positions: int = 4) -> Constants:
    """Constants small enough that the kept components still have a say."""
    constants = random_constants(model, n_positions)
    return replace(constants, heads=0.5 * constants.heads, mlps=0.5 * constants.mlps)


def circuit_of(what: str, model) -> Circuit:
    if what == "components":
        return CIRCUIT
    graph = Graph.of(model.config)
    drawn = torch.rand(1, len(graph), generator=torch.Generator().manual_seed(4)) < 0.7
    return Circuit.from_mask(graph, without_dangling(graph, drawn)[0])


def logits_by_rows(model, batch, circuit: Circuit, constants: Constants) -> torch.Tensor:
    mask = circuit.mask.double().expand(len(batch), -1)
    return masked_logits(model, batch, mask, constants.replacements(batch), constants.bos_token_id)


def generate(model, batch, **options):
    return model.generate(
        batch.tokens,
        attention_mask=batch.attention_mask.long(),
        do_sample=False,
        min_new_tokens=STEPS,
        max_new_tokens=STEPS,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("what", ["components", "edges"])
@pytest.mark.parametrize("n_positions", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_call_inside_equals_masked_logits(any_model, what, side, n_positions):
    circuit = circuit_of(what, any_model)
    constants = small_constants(any_model, n_positions)
    for lengths in ([7, 4, 2], [6, 6]):
        batch = random_batch(lengths, side)
        with ablated(any_model, circuit, constants) as model:
            assert model is any_model
            whole = model(**model_inputs(batch)).logits
        found = torch.stack([whole[row, batch.scored[row]] for row in range(len(batch))])
        assert_close(found, logits_by_rows(any_model, batch, circuit, constants), **EXACT)
        clean = any_model(**model_inputs(batch)).logits
        assert (clean - whole).abs().max() > 1e-3


@pytest.mark.parametrize("what", ["components", "edges"])
def test_every_position_is_ablated_as_if_it_were_the_last(any_model, what):
    circuit = circuit_of(what, any_model)
    constants = small_constants(any_model)
    row = random_batch([7]).tokens[0].tolist()
    with ablated(any_model, circuit, constants):
        whole = any_model(torch.tensor([row])).logits[0]
    for length in range(1, 8):
        alone = logits_by_rows(any_model, batch_of([row[:length]]), circuit, constants)
        assert_close(whole[length - 1], alone[0, 0], **EXACT)


@pytest.mark.parametrize("what", ["components", "edges"])
@pytest.mark.parametrize("n_positions", [1, 9])
@pytest.mark.parametrize("lengths", [[5], [6, 3, 5]], ids=["one prompt", "padded on the left"])
def test_generation_with_the_cache_equals_one_without_and_masked_logits(any_model, what, lengths, n_positions):
    circuit = circuit_of(what, any_model)
    constants = small_constants(any_model, n_positions)
    batch = random_batch(lengths, "left")
    with ablated(any_model, circuit, constants):
        cached = generate(any_model, batch, use_cache=True)
        plain = generate(any_model, batch, use_cache=False)
    assert cached.past_key_values is not None
    assert plain.past_key_values is None
    assert torch.equal(cached.sequences, plain.sequences)
    for row, mask in enumerate(batch.attention_mask):
        prompt = batch.tokens[row][mask].tolist()
        made = cached.sequences[row, batch.tokens.shape[1] :].tolist()
        steps = batch_of([prompt + made[:step] for step in range(STEPS)])
        expected = logits_by_rows(any_model, steps, circuit, constants)[:, 0]
        for generated in (cached, plain):
            assert_close(torch.stack(generated.logits)[:, row], expected, **EXACT)
    clean = generate(any_model, batch, use_cache=True)
    # An edge circuit may still say the same.
    assert (torch.stack(clean.logits) - torch.stack(cached.logits)).abs().max() > 1e-3


@pytest.mark.parametrize("what", ["components", "edges"])
def test_generation_with_a_static_cache_equals_one_without(any_model, what):
    circuit = circuit_of(what, any_model)
    # Such a cache comes with a mask of four dimensions, from which no positions can be counted.
    constants = small_constants(any_model, 9)
    batch = random_batch([6, 3, 5], "left")
    static = {"cache_implementation": "static", "disable_compile": True}
    if any_model.config.model_type in WRONG_WITH_A_STATIC_CACHE:
        itself = [generate(any_model, batch, **options).sequences for options in (static, {"use_cache": False})]
        assert not torch.equal(*itself)
        pytest.skip("Without any ablation, too, this family generates something else with a static cache.")
    with ablated(any_model, circuit, constants):
        cached = generate(any_model, batch, **static)
        plain = generate(any_model, batch, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits), **EXACT)


def test_all_kept_is_the_model_itself(any_model):
    batch = random_batch([6, 3], "left")
    constants = random_constants(any_model, 4)
    with ablated(any_model, WHOLE, constants):
        inside, made = any_model(**model_inputs(batch)).logits, generate(any_model, batch)
    assert torch.equal(inside, any_model(**model_inputs(batch)).logits)
    assert torch.equal(made.sequences, generate(any_model, batch).sequences)


def test_the_bos_is_ablated_only_where_constants_say_so(any_model):
    constants = small_constants(any_model)
    tokens = torch.tensor([[BOS]])
    clean = any_model(tokens).logits
    with ablated(any_model, CIRCUIT, constants):
        assert_close(any_model(tokens).logits, clean, **EXACT)
    with ablated(any_model, CIRCUIT, replace(constants, bos_token_id=None)):
        assert (any_model(tokens).logits - clean).abs().max() > 1e-3


def test_arguments_may_be_positional_or_named_and_without_gradients(any_model):
    constants = small_constants(any_model)
    tokens = random_batch([5, 5]).tokens
    with ablated(any_model, CIRCUIT, constants):
        named, positional = any_model(input_ids=tokens).logits, any_model(tokens).logits
        with torch.no_grad():
            without = any_model(tokens).logits
    with torch.no_grad(), ablated(any_model, CIRCUIT, constants):
        outside = any_model(tokens).logits
    for other in (positional, without, outside):
        assert torch.equal(other, named)


def test_contexts_follow_each_other(any_model):
    batch = random_batch([5])
    for seed in range(2):
        constants = random_constants(any_model, 3, seed)
        with ablated(any_model, CIRCUIT, constants):
            found = any_model(**model_inputs(batch)).logits[:, -1:]
        assert_close(found, logits_by_rows(any_model, batch, CIRCUIT, constants), **EXACT)


def hooks_of(model) -> list:
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in hooks
    ]


def test_the_model_is_untouched_afterwards_and_after_an_exception(any_model):
    batch = random_batch([6, 4])
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    modules = [(name, id(module)) for name, module in any_model.named_modules()]
    clean = any_model(input_ids=batch.tokens).logits
    constants = small_constants(any_model)
    with ablated(any_model, CIRCUIT, constants):
        generate(any_model, batch_of([[BOS, 5]]))
    assert not hooks_of(any_model)

    def fail() -> None:
        assert hooks_of(any_model)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), ablated(any_model, CIRCUIT, constants):
        fail()
    with pytest.raises(IndexError), ablated(any_model, CIRCUIT, constants):
        any_model(input_ids=torch.tensor([[10**6]]))
    assert not hooks_of(any_model)
    assert modules == [(name, id(module)) for name, module in any_model.named_modules()]
    for name, tensor in any_model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in any_model.parameters())
    assert torch.equal(any_model(input_ids=batch.tokens).logits, clean)


def test_embeddings_in_place_of_tokens_are_refused(any_model):
    embeddings = torch.zeros(1, 3, 32, dtype=torch.float64)
    with (
        ablated(any_model, CIRCUIT, small_constants(any_model)),
        pytest.raises(ConfigurationError, match="inputs_embeds has no tokens"),
    ):
        any_model(inputs_embeds=embeddings)


def refused(model, circuit: Circuit, constants: Constants) -> str:
    with pytest.raises(ArtefactError) as caught, ablated(model, circuit, constants):
        pytest.fail("the context was entered")
    assert not hooks_of(model)
    return str(caught.value)


@pytest.mark.parametrize("components", [Components(2, 4), Components(3, 5)])
def test_a_circuit_of_other_sizes_is_refused(any_model, components):
    message = refused(any_model, Circuit(components, ("m0",)), small_constants(any_model))
    assert f"{components.n_layers} layers of {components.n_heads} heads; this one has 3 layers of 4 heads" in message


@pytest.mark.parametrize("name", ["n_layers", "n_heads", "d_head", "d_model"])
def test_constants_of_other_sizes_are_refused(any_model, name):
    sizes = Dimensions.of(any_model.config)
    constants = Constants.zeros(replace(sizes, **{name: getattr(sizes, name) + 1}), BOS)
    assert "The constants have sizes" in refused(any_model, CIRCUIT, constants)


def test_artefacts_of_another_model_are_refused(any_model):
    other = tiny_model(any_model.config.model_type, seed=1)
    constants = small_constants(any_model)
    theirs = {"model": "the-other-one", "fingerprint": fingerprint(other)}
    message = refused(any_model, Circuit(COMPONENTS, ("m0",), None, theirs), constants)
    assert "The circuit belongs to the-other-one" in message
    assert fingerprint(other) in message
    assert fingerprint(any_model) in message
    assert "The constants belong" in refused(any_model, CIRCUIT, replace(constants, provenance=theirs))


def test_artefacts_of_this_model_are_taken(any_model):
    mine = {"model": "this", "fingerprint": fingerprint(any_model)}
    circuit = Circuit(COMPONENTS, CIRCUIT.nodes, None, mine)
    with ablated(any_model, circuit, replace(small_constants(any_model), provenance=mine)):
        any_model(torch.tensor([[BOS, 5]]))


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_eager_attention_in_double_precision_generates_after_padding_on_the_left(family):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    constants = small_constants(model)
    batch = random_batch([6, 3, 1], "left")
    with ablated(model, CIRCUIT, constants):
        made = generate(model, batch)
    assert torch.stack(made.logits).isfinite().all()
