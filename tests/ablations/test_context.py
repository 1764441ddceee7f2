"""A model that runs as its circuit: calls and generation inside the context, and nothing of it afterwards."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.constants import Constants
from oa_train.ablations.context import ablated
from oa_train.batches import Batch
from oa_train.circuits.circuit import Circuit
from oa_train.engine.forward import model_inputs, scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.engine.prefix import prefix_logits
from oa_train.engine.reading import read_values
from oa_train.errors import ArtefactError, ConfigurationError, ModelError, TaskError
from oa_train.models.graph import Graph
from oa_train.models.hooks import Tap, tapped
from oa_train.models.loading import load_model
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec
from oa_train.models.weights import fingerprint
from tests.builders import BOS, batch_of, random_batch, random_constants, tiny_model, traces, with_spans
from tests.engine.selections import SELECTIONS, SPANNED, selection

EXACT = {"rtol": 0, "atol": 1e-12}
KEPT = ("a0.h0", "a0.h3", "m0", "a1.h2", "m1", "a2.h1", "m2")
STEPS = 3
# Its attention takes the last columns of the cache for the newest, and in a static cache those are still empty.
WRONG_WITH_A_STATIC_CACHE = {"gpt_neo"}


def nodes_circuit(model) -> Circuit:
    return Circuit(Nodes.of(model.config), KEPT)


def circuit_of(model, name: str) -> Circuit:
    """A circuit of heads and MLPs, of edges, or of units of other kinds."""
    if name == "nodes":
        return nodes_circuit(model)
    level = Graph.of(model.config) if name == "edges" else selection(model, name)
    drawn = torch.rand(1, len(level), generator=torch.Generator().manual_seed(4)) < 0.7
    if len(level) < 4:
        drawn[:, -2:] = False
    return Circuit.from_mask(level, level.prune(drawn)[0])


def small_constants(circuit: Circuit, n_positions: int = 1) -> Constants:
    """Constants small enough that what is kept still has a say."""
    halves = random_constants(circuit.level, n_positions).mapped(lambda table: 0.5 * table)
    return replace(halves, provenance={"bos_token_id": BOS})


def spanned(batch: Batch) -> Batch:
    return with_spans(batch, s=(1, 2))


def logits_by_rows(model, batch: Batch, circuit: Circuit, constants: Constants) -> torch.Tensor:
    mask = circuit.mask.double().expand(len(batch), -1)
    return masked_logits(model, batch, circuit.level, mask, constants.replacements(batch))


def generate(model, batch: Batch, **options):
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


def step_by_step(model, prompt: list[int], made: list[int], circuit: Circuit, constants: Constants) -> torch.Tensor:
    """Logits from which each token was taken; spans are those of the prompt alone."""
    steps = batch_of([prompt + made[:step] for step in range(STEPS)])
    at_the_end = {"-1": (len(prompt) - 1,)}
    return logits_by_rows(model, with_spans(steps, s=(1, 2), **at_the_end), circuit, constants)[:, 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["nodes", "edges", *SELECTIONS])
def test_a_call_inside_equals_masked_logits(archetype, name, side):
    circuit = circuit_of(archetype, name)
    constants = small_constants(circuit, 1 if name == SPANNED else 4)
    for lengths in ([7, 4, 5], [6, 6]):
        batch = spanned(random_batch(lengths, side))
        with ablated(archetype, circuit, constants, batch.spans) as model:
            assert model is archetype
            whole = model(**model_inputs(batch)).logits
        logits = torch.stack([whole[row, batch.scored[row]] for row in range(len(batch))])
        assert_close(logits, logits_by_rows(archetype, batch, circuit, constants), **EXACT)
        assert (archetype(**model_inputs(batch)).logits - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["nodes", "edges"])
def test_every_position_is_ablated_as_if_it_were_the_last(archetype, name):
    circuit = circuit_of(archetype, name)
    constants = small_constants(circuit, 4)
    row = random_batch([7]).tokens[0].tolist()
    with ablated(archetype, circuit, constants):
        whole = archetype(torch.tensor([row])).logits[0]
    for length in range(1, 8):
        alone = logits_by_rows(archetype, batch_of([row[:length]]), circuit, constants)
        assert_close(whole[length - 1], alone[0, 0], **EXACT)


def assert_generation(model, circuit: Circuit, constants: Constants, batch: Batch) -> None:
    with ablated(model, circuit, constants, batch.spans):
        cached = generate(model, batch, use_cache=True)
        plain = generate(model, batch, use_cache=False)
    assert cached.past_key_values is not None
    assert plain.past_key_values is None
    assert torch.equal(cached.sequences, plain.sequences)
    for row, real in enumerate(batch.attention_mask):
        made = cached.sequences[row, batch.tokens.shape[1] :].tolist()
        expected = step_by_step(model, batch.tokens[row][real].tolist(), made, circuit, constants)
        for generated in (cached, plain):
            assert_close(torch.stack(generated.logits)[:, row], expected, **EXACT)
    # A circuit may still say the same as the model.
    assert (scored_logits(model, batch)[:, 0] - cached.logits[0]).abs().max() > 1e-3


def test_generation_with_the_cache_equals_one_without_and_masked_logits(any_model):
    circuit = circuit_of(any_model, "nodes")
    assert_generation(any_model, circuit, small_constants(circuit, 9), random_batch([6, 3], "left"))


@pytest.mark.parametrize("lengths", [[5], [6, 3, 5]], ids=["one prompt", "padded on the left"])
def test_edges_are_replaced_while_generating(archetype, lengths):
    circuit = circuit_of(archetype, "edges")
    assert_generation(archetype, circuit, small_constants(circuit, 9), random_batch(lengths, "left"))


@pytest.mark.parametrize("name", SELECTIONS)
def test_units_of_every_kind_and_spans_are_replaced_while_generating(archetype, name):
    circuit = circuit_of(archetype, name)
    assert_generation(archetype, circuit, small_constants(circuit), spanned(random_batch([6, 4], "left")))


@pytest.mark.parametrize("patterns", [["m*@s", "a*@s"], ["m*@-1", "a*@-1"]], ids=["a named span", "the last token"])
def test_what_is_generated_is_replaced_only_by_entries_without_a_span(archetype, patterns):
    level = Nodes.of(archetype.config, patterns=patterns)
    assert None not in level.spans
    circuit = Circuit(level, ())
    assert_generation(archetype, circuit, small_constants(circuit), spanned(random_batch([6, 5], "left")))


@pytest.mark.parametrize("name", ["edges", SPANNED])
def test_beams_have_the_spans_of_their_prompt(archetype, name):
    circuit, batch = circuit_of(archetype, name), spanned(random_batch([6, 5], "left"))
    constants = small_constants(circuit)
    with ablated(archetype, circuit, constants, batch.spans):
        results = [
            generate(archetype, batch, use_cache=cache, num_beams=3, output_scores=True) for cache in (True, False)
        ]
    for result in results:
        for row, real in enumerate(batch.attention_mask):
            made = result.sequences[row, 6:].tolist()
            logits = step_by_step(archetype, batch.tokens[row][real].tolist(), made, circuit, constants)
            score = logits.log_softmax(-1)[range(STEPS), made].mean()
            assert_close(result.sequences_scores[row].double(), score, rtol=0, atol=1e-5)
    assert torch.equal(results[0].sequences, results[1].sequences)


@pytest.mark.parametrize("name", ["nodes", "edges"])
def test_generation_with_a_static_cache_equals_one_without(archetype, name):
    circuit = circuit_of(archetype, name)
    # Such a cache comes with a mask of four dimensions, from which no positions can be counted.
    constants = small_constants(circuit, 9)
    batch = random_batch([6, 3, 5], "left")
    static = {"cache_implementation": "static", "disable_compile": True}
    if archetype.config.model_type in WRONG_WITH_A_STATIC_CACHE:
        clean = [generate(archetype, batch, **options).sequences for options in (static, {"use_cache": False})]
        assert not torch.equal(*clean)
        pytest.skip("Without any ablation, too, this family generates something else with a static cache.")
    with ablated(archetype, circuit, constants):
        cached = generate(archetype, batch, **static)
        plain = generate(archetype, batch, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits), **EXACT)


def test_all_kept_is_the_model_itself(archetype):
    batch, level = random_batch([6, 3], "left"), Nodes.of(archetype.config)
    whole = Circuit(level, level.names)
    with ablated(archetype, whole, random_constants(level, 4)):
        inside, made = archetype(**model_inputs(batch)).logits, generate(archetype, batch)
    assert torch.equal(inside, archetype(**model_inputs(batch)).logits)
    assert torch.equal(made.sequences, generate(archetype, batch).sequences)


def test_the_first_token_is_protected_where_constants_name_it(archetype):
    circuit = nodes_circuit(archetype)
    constants, tokens = small_constants(circuit), torch.tensor([[BOS]])
    clean = archetype(tokens).logits
    with ablated(archetype, circuit, constants):
        assert_close(archetype(tokens).logits, clean, **EXACT)
    with ablated(archetype, circuit, replace(constants, provenance={})):
        assert (archetype(tokens).logits - clean).abs().max() > 1e-3


def test_arguments_may_be_positional_or_named_and_without_gradients(archetype):
    circuit, tokens = nodes_circuit(archetype), random_batch([5, 5]).tokens
    constants = small_constants(circuit)
    with ablated(archetype, circuit, constants):
        named, positional = archetype(input_ids=tokens).logits, archetype(tokens).logits
        with torch.no_grad():
            without = archetype(tokens).logits
    with torch.no_grad(), ablated(archetype, circuit, constants):
        outside = archetype(tokens).logits
    for other in (positional, without, outside):
        assert torch.equal(other, named)


def test_contexts_follow_each_other(archetype):
    batch, circuit = random_batch([5]), nodes_circuit(archetype)
    for seed in range(2):
        constants = replace(random_constants(circuit.level, 3, seed), provenance={"bos_token_id": BOS})
        with ablated(archetype, circuit, constants):
            logits = archetype(**model_inputs(batch)).logits[:, -1:]
        assert_close(logits, logits_by_rows(archetype, batch, circuit, constants), **EXACT)


@pytest.mark.parametrize("name", ["edges", SPANNED])
def test_the_model_is_untouched_afterwards_and_after_an_exception(archetype, name):
    batch, circuit = spanned(random_batch([6, 5])), circuit_of(archetype, name)
    before, clean = traces(archetype), archetype(input_ids=batch.tokens).logits
    constants = small_constants(circuit)
    with ablated(archetype, circuit, constants, batch.spans):
        archetype(input_ids=batch.tokens)
    assert traces(archetype) == before

    def fail() -> None:
        assert traces(archetype) != before
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), ablated(archetype, circuit, constants):
        fail()
    with pytest.raises(IndexError), ablated(archetype, circuit, constants, batch.spans):
        archetype(input_ids=torch.full((2, 6), 10**6))
    assert traces(archetype) == before
    assert torch.equal(archetype(input_ids=batch.tokens).logits, clean)


def test_hidden_states_are_the_stream_of_a_circuit_of_nodes(archetype):
    batch, circuit, entered = random_batch([6, 6]), nodes_circuit(archetype), []
    parts = find_parts(archetype)
    taps = [Tap(module, "input", entered.append) for module in (*parts.blocks, parts.final_norm)]
    with ablated(archetype, circuit, small_constants(circuit)), tapped(taps):
        states = archetype(batch.tokens, output_hidden_states=True).hidden_states
    assert len(states) == 4
    for state, stream in zip(states[:3], entered[:3], strict=True):
        assert torch.equal(state, stream)
    assert torch.equal(states[3], parts.final_norm(entered[3]))
    clean = archetype(batch.tokens, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], clean[0])
    assert all(
        (ablated_state - state).abs().max() > 1e-3 for ablated_state, state in zip(states[1:], clean[1:], strict=True)
    )


def test_hidden_states_of_a_circuit_of_edges_are_refused(archetype):
    batch, circuit = random_batch([6, 6]), circuit_of(archetype, "edges")
    with ablated(archetype, circuit, small_constants(circuit)) as model:
        with pytest.raises(ConfigurationError, match="output_hidden_states is set in a call under a circuit of edges"):
            model(batch.tokens, output_hidden_states=True)
        with pytest.raises(ConfigurationError, match="where no layer has a hidden state"):
            generate(model, batch, output_hidden_states=True)
        model(batch.tokens, output_hidden_states=False)


def test_embeddings_in_place_of_tokens_are_refused(archetype):
    circuit = nodes_circuit(archetype)
    with (
        ablated(archetype, circuit, small_constants(circuit)),
        pytest.raises(ConfigurationError, match="inputs_embeds has no tokens"),
    ):
        archetype(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))


@pytest.fixture(scope="module")
def gpt2():
    return tiny_model("gpt2")


def refused(model, circuit: Circuit, constants: Constants) -> str:
    before = traces(model)
    with pytest.raises(ArtefactError) as caught, ablated(model, circuit, constants):
        pytest.fail("the context was entered")
    assert traces(model) == before
    return str(caught.value)


def test_a_circuit_of_other_sizes_is_refused(gpt2):
    constants, sizes = small_constants(nodes_circuit(gpt2)), Nodes.of(gpt2.config).dimensions
    for changed in ({"n_layers": 2}, {"n_heads": 5}):
        level = Nodes(replace(sizes, **changed))
        message = refused(gpt2, Circuit(level, ("m0",)), constants)
        heads = f"{level.dimensions.n_layers} layers of {level.dimensions.n_heads} heads"
        assert heads in message
        assert "this one has 3 layers of 4 heads" in message


def test_constants_that_do_not_fit_are_refused(gpt2):
    circuit = nodes_circuit(gpt2)
    tables = small_constants(circuit).tables
    lacking = Constants({site: table for site, table in tables.items() if site != Site("heads", 1)})
    assert "lack the site heads_1" in refused(gpt2, circuit, lacking)
    wide = Constants({**tables, Site("mlp", 1): torch.zeros(1, 1, 33)})
    assert "mlp_1 are for 1 units of width 33; this model has 1 units of width 32" in refused(gpt2, circuit, wide)
    spans = Circuit(Nodes.of(gpt2.config, patterns=["m1@s", "m1@-1"]), ())
    assert "were not made for the spans s, -1 of the circuit" in refused(gpt2, spans, small_constants(circuit))


def test_artefacts_of_another_model_are_refused_and_those_of_this_one_taken(gpt2):
    level, constants = Nodes.of(gpt2.config), small_constants(nodes_circuit(gpt2))
    other = {"model": "the-other-one", "fingerprint": fingerprint(tiny_model("gpt2", seed=1))}
    message = refused(gpt2, Circuit(level, ("m0",), None, other), constants)
    assert "The circuit belongs to the-other-one" in message
    assert other["fingerprint"] in message
    assert fingerprint(gpt2) in message
    circuit = Circuit(level, KEPT)
    assert "The constants belong" in refused(gpt2, circuit, replace(constants, provenance=other))
    own = {"model": "this", "fingerprint": fingerprint(gpt2)}
    with ablated(gpt2, Circuit(level, KEPT, None, own), replace(constants, provenance=own)):
        gpt2(torch.tensor([[BOS, 5]]))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["m1@subject"], "no span 'subject' in these prompts"),
        (["m1@start"], "'start' holds protected tokens only in prompt 0"),
        (["m1@far"], "'far' is empty in prompt 1"),
        (["m1@-6"], "'-6' is empty in prompt 1"),
        (["m1@s", "m1@t"], "'s' and 't' share a token, and both restrict the same unit"),
        (["m1@t", "m1@-1"], "share a token"),
    ],
)
def test_spans_that_cannot_be_ablated_are_refused(gpt2, patterns, message):
    batch = with_spans(random_batch([7, 5], "left"), s=(2, 3), t=(3, 4), start=(0,), far=(5, 6))
    circuit = Circuit(Nodes.of(gpt2.config, patterns=patterns), ())
    before = traces(gpt2)
    with ablated(gpt2, circuit, small_constants(circuit), batch.spans):
        with pytest.raises(TaskError, match=message):
            gpt2(**model_inputs(batch))
        with pytest.raises(TaskError, match=message):
            generate(gpt2, batch)
    assert traces(gpt2) == before


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_eager_attention_in_double_precision_generates_after_padding_on_the_left(family):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    circuit = nodes_circuit(model)
    with ablated(model, circuit, small_constants(circuit)):
        made = generate(model, random_batch([6, 3, 1], "left"))
    assert torch.stack(made.logits).isfinite().all()


def compiled_model(model, backend: str) -> None:
    model.compile(backend=backend)


def compiled_forward(model, backend: str) -> None:
    model.forward = torch.compile(model.forward, backend=backend)


def compiled_block(model, backend: str) -> None:
    model.transformer.h[1].compile(backend=backend)


def compiled_block_forward(model, backend: str) -> None:
    block = model.transformer.h[1]
    block.forward = torch.compile(block.forward, backend=backend)


# How a model can be compiled in place; a compiled call ignores functions that are attached after it was made.
IN_PLACE = [compiled_model, compiled_forward, compiled_block, compiled_block_forward]


def assert_compiled_is_ablated_all_the_same(compile_in_place, backend: str, tolerance: float) -> None:
    model, plain = (load_model(LMSpec("tiny")) for _ in range(2))
    batch = random_batch([7, 7])
    clean = plain(batch.tokens).logits
    compile_in_place(model, backend)
    near = {"rtol": 0, "atol": tolerance}
    assert_close(model(batch.tokens).logits, clean, **near)
    for circuit in (Circuit.from_patterns(Nodes.of(model.config), ["a0"]), circuit_of(model, "edges")):
        zeros = Constants.zeros(circuit.level)
        with ablated(plain, circuit, zeros):
            expected, made = plain(batch.tokens).logits, generate(plain, batch)
        with ablated(model, circuit, zeros):
            assert torch.equal(model(batch.tokens).logits, expected)
            assert torch.equal(generate(model, batch).sequences, made.sequences)
        mask, values = circuit.mask.float().expand(2, -1), zeros.replacements(batch)
        assert torch.equal(
            masked_logits(model, batch, circuit.level, mask, values),
            masked_logits(plain, batch, circuit.level, mask, values),
        )
        assert (expected - clean).abs().max() > 1e-2
    level = Nodes.of(model.config)
    mask, values = ~level.selected(["a1.h0"]).unsqueeze(0), random_constants(level).mapped(torch.Tensor.float)
    shared = [prefix_logits(each, batch, level, mask, values.replacements(batch)).ablated for each in (model, plain)]
    assert torch.equal(*shared)
    for site, value in read_values(model, batch, level).items():
        assert torch.equal(value, read_values(plain, batch, level)[site])
    assert_close(model(batch.tokens).logits, clean, **near)


@pytest.mark.parametrize("compile_in_place", IN_PLACE)
def test_a_model_that_is_compiled_in_place_is_ablated_all_the_same(compile_in_place):
    assert_compiled_is_ablated_all_the_same(compile_in_place, "eager", 0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_a_model_that_is_compiled_to_machine_code_is_ablated_all_the_same():
    assert_compiled_is_ablated_all_the_same(compiled_model, "inductor", 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_compiled_wrapper_is_refused_with_what_to_give_instead(monkeypatch, dtype):
    # Else the type checker of the tests refuses it before.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = load_model(LMSpec("tiny", dtype=dtype))
    wrapper, batch = torch.compile(model, backend="eager"), random_batch([5, 5])
    level, message = Nodes.of(model.config), r"model._orig_mod of the compiled one\), or compile it in place"
    zeros, before = Constants.zeros(level), traces(model)
    with pytest.raises(ModelError, match=message), ablated(wrapper, Circuit(level, ("m0",)), zeros):
        pytest.fail("the context was entered")
    with pytest.raises(ModelError, match=message):
        masked_logits(wrapper, batch, level, torch.ones(2, len(level)), zeros.replacements(batch))
    with pytest.raises(ModelError, match=message):
        masked_logits(wrapper, batch, Graph.of(model.config), torch.ones(2, 1), zeros.replacements(batch))
    with pytest.raises(ModelError, match=message):
        read_values(wrapper, batch, level)
    assert traces(model) == before
