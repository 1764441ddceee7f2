"""What circuits of edges refuse, because the answer would be wrong without a sign of it."""

import gc
import weakref
from functools import wraps

import pytest
import torch
from torch import nn

from oa_train.engine.edges.run import edges_called, run_edges
from oa_train.engine.forward import model_inputs, scored_logits
from oa_train.engine.nodes import node_taps
from oa_train.errors import ConfigurationError, ModelError
from oa_train.models.families import check_family
from oa_train.models.parts import find_parts
from oa_train.models.residual import find_residual_parts
from oa_train.models.selection import Nodes
from tests.builders import tiny_model
from tests.engine.edges.helpers import ARCHETYPES, all_kept, graph_of, protected_batch, random_values


class Adapter(nn.Module):
    """A linear map and a low-rank one beside it, as peft has them."""

    def __init__(self, base_layer, width):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(width, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, find_width(base_layer), bias=False, dtype=torch.float64)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, hidden):
        return self.base_layer(hidden) + self.up(self.down(hidden))


class Linear8bit(nn.Linear):
    """A linear map of 8-bit weights, as bitsandbytes has them."""

    def __init__(self, base):
        super().__init__(base.weight.shape[1], base.weight.shape[0], dtype=torch.float64)
        self.weight = nn.Parameter(base.weight.mul(100).to(torch.int8), requires_grad=False)

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype) / 100)


class Scaled(nn.Linear):
    """A linear map with code of its own."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def find_width(base_layer):
    return base_layer.nf if hasattr(base_layer, "nf") else base_layer.out_features


def swap(model, layer, path, module):
    """Put another module into a block."""
    holder, _, name = path.rpartition(".")
    setattr(find_parts(model).blocks[layer].get_submodule(holder), name, module)


def logits_of(model, batch=None):
    batch = batch or protected_batch([5])
    values = random_values(model, gradients=False)
    return run_edges(model, batch, graph_of(model), all_kept(model, len(batch)), values)


@pytest.mark.parametrize("family", ARCHETYPES)
def test_an_adapter_is_refused_and_nodes_work_with_it(family):
    model, batch = tiny_model(family), protected_batch([5])
    logits_of(model)  # an adapter that comes after the first run is noticed as well
    path = check_family(family).projections[0]
    base = find_parts(model).blocks[1].get_submodule(path)
    swap(model, 1, path, Adapter(base, 32))
    with pytest.raises(ModelError, match=rf"{path} of layer 1 is an adapter.*Adapter\).*merge_and_unload.*nodes"):
        logits_of(model)
    nodes = Nodes.of(model.config)
    mask = torch.zeros(1, len(nodes), dtype=torch.float64)
    scored_logits(model, batch, node_taps(model, nodes, mask, random_values(model, gradients=False), batch.layout))
    swap(model, 1, path, base)
    logits_of(model)


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Linear8bit, "quantised.*Load the model with weights"), (Scaled, "neither torch.nn.Linear nor.*Put a plain")],
)
@pytest.mark.parametrize("path", ["self_attn.v_proj", "self_attn.o_proj"])
def test_what_is_no_plain_linear_map_is_refused_with_its_reason(module, reason, path):
    model = tiny_model("llama")
    base = find_parts(model).blocks[2].get_submodule(path)
    swap(model, 2, path, module(base) if module is Linear8bit else module(*base.weight.T.shape, dtype=torch.float64))
    with pytest.raises(ModelError, match=f"{path} of layer 2 is {reason}"):
        logits_of(model)


def test_a_class_that_is_changed_in_place_is_noticed():
    model = tiny_model("llama")
    logits_of(model)
    nn.utils.parametrizations.weight_norm(find_parts(model).blocks[0].self_attn.k_proj)
    with pytest.raises(ModelError, match=r"self_attn\.k_proj of layer 0 is neither"):
        logits_of(model)


def test_a_real_adapter_of_peft_is_refused():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ModelError, match="an adapter"):
        logits_of(model)


@pytest.mark.parametrize("family", ARCHETYPES)
def test_what_was_looked_up_is_no_older_than_the_model(family):
    model, other, batch = tiny_model(family), tiny_model(family, seed=1), protected_batch([6, 4])
    logits_of(model, batch)
    assert find_residual_parts(model) is find_residual_parts(model)
    # Another block, another projection, other weights in place, another data type.
    model.get_submodule(check_family(family).blocks)[1] = find_parts(other).blocks[1]
    path = check_family(family).projections[-1]
    swap(model, 0, path, find_parts(other).blocks[0].get_submodule(path))
    with torch.no_grad():
        for norm in (find_residual_parts(model).attention[2].norm, *find_residual_parts(model).post_norms):
            norm.weight.mul_(1.5)
        find_parts(model).attention_outputs[2].weight.mul_(0.5)
    torch.testing.assert_close(logits_of(model, batch), scored_logits(model, batch), rtol=0, atol=1e-5)
    model.float()
    torch.testing.assert_close(logits_of(model, batch), scored_logits(model, batch), rtol=0, atol=1e-2)


def test_a_model_that_was_looked_up_can_go():
    model = tiny_model("gpt2")
    logits_of(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_a_model_that_is_not_as_its_entry_says_is_refused():
    model = tiny_model("llama")
    del find_parts(model).blocks[1].self_attn.k_proj
    with pytest.raises(ModelError, match="not built as its entry in the family table says"):
        logits_of(model)


def test_hidden_states_are_refused(any_model):
    batch = protected_batch([5])
    graph, values = graph_of(any_model), random_values(any_model, gradients=False)

    def call(**options):
        with edges_called(any_model, graph, all_kept(any_model, 1), values, batch.layout):
            return any_model(**model_inputs(batch), **options)

    expected = call().logits
    for requested in (True, [1]):
        with pytest.raises(ConfigurationError, match="output_hidden_states"):
            call(output_hidden_states=requested)
    any_model.config.output_hidden_states = True
    try:
        with pytest.raises(ConfigurationError, match="output_hidden_states"):
            call()
        assert torch.equal(call(output_hidden_states=False).logits, expected)
    finally:
        any_model.config.output_hidden_states = False
    assert torch.equal(call().logits, expected)


@pytest.mark.parametrize("family", ARCHETYPES)
def test_foreign_hooks_on_what_nobody_reads_are_refused(family):
    model = tiny_model(family)
    entry, block = check_family(family), find_parts(model).blocks[1]
    projection, output = block.get_submodule(entry.projections[-1]), find_parts(model).attention_outputs[1]
    expected = logits_of(model)

    def steer(*_):
        return None

    around = entry.projections[-1].rpartition(".")[0]
    norm = block.get_submodule(entry.attention_norm)
    for register, name in (
        (block.register_forward_hook, "block 1"),
        (block.register_forward_pre_hook, "block 1"),
        (block.get_submodule(around).register_forward_hook, f"{around} of block 1"),
        (norm.register_forward_hook, f"{entry.attention_norm} of block 1"),
        (projection.register_forward_pre_hook, f"the input of {entry.projections[-1]} of block 1"),
        (output.register_forward_hook, f"the output of {entry.attention_output} of block 1"),
    ):
        handle = register(steer)
        with pytest.raises(ConfigurationError, match=rf"A function is attached to {name} \(.*steer"):
            logits_of(model)
        with (
            pytest.raises(ConfigurationError, match="A function is attached"),
            edges_called(
                model, graph_of(model), all_kept(model, 1), random_values(model), protected_batch([5]).layout
            ),
        ):
            pass
        handle.remove()
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.o_proj"])
def test_another_forward_of_a_projection_is_refused(path):
    model = tiny_model("llama")
    module = find_parts(model).blocks[2].get_submodule(path)
    module.forward = lambda hidden: 2 * nn.Linear.forward(module, hidden)
    with pytest.raises(ConfigurationError, match=f"A function is attached to {path} of block 2"):
        logits_of(model)
    del module.forward
    expected = logits_of(model)
    compiled = wraps(module.forward)(lambda hidden: nn.Linear.forward(module, hidden))
    compiled._torchdynamo_orig_callable = module.forward  # as torch.compile notes it down
    module.forward = compiled
    assert torch.equal(logits_of(model), expected)


def test_one_circuit_of_edges_inside_another_is_refused():
    model, batch = tiny_model("llama"), protected_batch([5])
    with (
        edges_called(model, graph_of(model), all_kept(model, 1), random_values(model), batch.layout),
        pytest.raises(ConfigurationError, match="A function is attached"),
    ):
        logits_of(model)


def test_hooks_of_libraries_are_no_steering():
    model, batch = tiny_model("llama"), protected_batch([5])
    expected = logits_of(model, batch)
    model(**model_inputs(batch), output_hidden_states=True, output_attentions=True)  # leaves hooks behind
    assert find_parts(model).blocks[1]._forward_hooks
    assert torch.equal(logits_of(model, batch), expected)
