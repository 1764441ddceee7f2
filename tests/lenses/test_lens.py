"""Lenses: what each computes, their artefact, and tuned lenses of another library's layout."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.engine.tail import scored_stream
from oa_train.errors import ArtefactError, ConfigurationError, TaskError
from oa_train.lenses.lens import LENS_KINDS, AffineLens, ConstantsLens, LogitLens, check_layers, check_lens_kinds
from oa_train.lenses.predictions import Tokens, lens_logits, mean_attention
from oa_train.lenses.trained_lenses import TrainedLenses, load_tuned_lens
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec
from tests.builders import batch_of, random_batch, small_ioi, tiny_model

EXACT = {"rtol": 0, "atol": 1e-10}


def at_two_positions(batch):
    """The batch, scored at two positions of each prompt but the last, which is scored at one."""
    scored = torch.stack([batch.attention_mask[row].nonzero().flatten()[[1, -1]] for row in range(len(batch))])
    weights = torch.full((len(batch), 2), 0.5)
    scored[-1] = scored[-1, 0]
    weights[-1] = torch.tensor([1.0, 0.0])
    answers = torch.full((len(batch), 2, 1), -1)
    return replace(batch, scored=scored, weights=weights, answers=answers, distractors=answers)


def test_the_logit_lens_at_the_last_layer_reads_the_models_own_stream(archetype):
    batch = random_batch([7, 5])
    tokens = Tokens(archetype, batch)
    (logits,) = lens_logits(LogitLens([3], 3, 32), archetype, tokens, slice(None))
    assert_close(logits, tokens.logits, **EXACT)
    assert kl_divergence(tokens.logits, logits.unsqueeze(0)).abs().max() < 1e-12


def test_constants_that_are_a_tokens_own_attention_outputs_give_the_model(archetype):
    tokens = Tokens(archetype, random_batch([7]), attention=True)
    lens = ConstantsLens(range(3), 3, 32).double()
    lens.load(tokens.attention[:, 0])
    for logits in lens_logits(lens, archetype, tokens, slice(None)):
        assert_close(logits, tokens.logits, **EXACT)
    shared = ConstantsLens(range(3), 3, 32, shared=True).double()
    shared.load(tokens.attention[:, 0])
    assert len(shared.constants) == 1
    assert_close(
        lens_logits(shared, archetype, tokens, slice(None)), lens_logits(lens, archetype, tokens, slice(None))
    )


@pytest.mark.parametrize("kind", ["tuned", "oca", "oca_shared", "logit", "mean"])
def test_a_lens_at_some_layers_is_the_same_lens(archetype, kind):
    tokens, lens = Tokens(archetype, random_batch([7, 5])), LENS_KINDS[kind].make(range(3), 3, 32).double()
    for number, parameter in enumerate(lens.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    whole = lens_logits(lens, archetype, tokens, slice(None))
    assert_close(lens_logits(lens.at([0, 2]), archetype, tokens, slice(None)), whole[[0, 2]], **EXACT)
    with pytest.raises(ConfigurationError, match=r"has no layer 3; it has 0 to 2"):
        lens.at([3])


def test_an_affine_lens_is_the_map_it_says(archetype):
    lens, streams = AffineLens([0, 1], 2, 4).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    assert_close(lens(archetype, streams), streams)
    torch.nn.init.normal_(lens.weight)
    torch.nn.init.normal_(lens.bias)
    expected = [[x + lens.weight[n] @ x + lens.bias[n] for x in streams[n]] for n in range(2)]
    assert_close(lens(archetype, streams), torch.stack([torch.stack(row) for row in expected]), **EXACT)


def test_tokens_are_the_scored_positions_and_average_within_prompts(archetype):
    batch = at_two_positions(random_batch([7, 5, 6], "left"))
    tokens = Tokens(archetype, batch)
    assert len(tokens) == 5
    assert tokens.rows.tolist() == [0, 0, 1, 1, 2]
    stream = scored_stream(archetype, batch)
    assert_close(tokens.logits[3], stream.logits[1, 1], **EXACT)
    values = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0]])
    assert tokens.by_prompt(values).tolist() == [[2.0, 6.0, 9.0]]
    assert [(piece.start, piece.stop) for piece in tokens.pieces(3, 6)] == [(0, 2), (2, 4), (4, 5)]


def test_partners_are_tokens_of_another_prompt(archetype):
    batch = at_two_positions(random_batch([7, 5, 6]))
    tokens = Tokens(archetype, batch, attention=True)
    partners = tokens.partners()
    assert_close(partners[:, 0], tokens.attention[:, 2], **EXACT)
    assert_close(partners[:, 1], tokens.attention[:, 3], **EXACT)
    assert_close(partners[:, 3], tokens.attention[:, 4], **EXACT)  # the next prompt has one token only
    assert_close(partners[:, 4], tokens.attention[:, 0], **EXACT)
    with pytest.raises(TaskError, match="A batch of one prompt has no other prompt"):
        Tokens(archetype, batch_of([[1, 5, 6]]), attention=True).partners()


def test_the_mean_over_prompts_weighs_their_positions():
    model, task = load_model(LMSpec()), small_ioi(n_means=6)
    (batch,) = task.batches("means", 6)
    attention = Tokens(model, batch, attention=True).attention
    assert_close(mean_attention(model, task), attention.mean(dim=1), rtol=1e-5, atol=1e-6)


def test_lenses_are_saved_and_read_back(tmp_path):
    lenses = {kind: LENS_KINDS[kind].make([0, 2], 3, 32) for kind in ("oca", "oca_shared", "tuned")}
    for lens in lenses.values():
        for parameter in lens.parameters():
            torch.nn.init.normal_(parameter)
    trained = TrainedLenses("some/run", lenses, 3, 32, {"fingerprint": "abc", "seed": 4})
    trained.save(tmp_path)
    loaded = TrainedLenses.load(tmp_path)
    assert list(loaded.lenses) == list(lenses)
    assert loaded.layers == [0, 2]
    assert loaded.fingerprint == "abc"
    for kind, lens in lenses.items():
        for name, tensor in lens.trained().items():
            assert torch.equal(loaded.lenses[kind].trained()[name], tensor)
    with pytest.raises(ArtefactError, match="The lens belongs to another model"):
        loaded.check_belongs(tiny_model("llama"))
    with pytest.raises(ArtefactError, match="to a model with 3 layers of width 32; this model has 3 of width 64"):
        loaded.check_belongs(load_model(LMSpec()))


def test_a_run_without_lenses_is_told(tmp_path):
    with pytest.raises(ArtefactError, match=r"has no lenses\. Give a finished run of LensModule"):
        TrainedLenses.load(tmp_path)


def tuned_lens(folder, **config):
    state = {}
    for layer in range(3):
        state |= {f"{layer}.weight": torch.randn(8, 8), f"{layer}.bias": torch.randn(8)}
    content = {"base_model_name_or_path": "x", "d_model": 8, "num_hidden_layers": 3, "bias": True} | config
    (folder / "config.json").write_text(json.dumps(content))
    torch.save(state, folder / "params.pt")
    return state


def test_tuned_lenses_of_alignment_research_load(tmp_path):
    state, streams = tuned_lens(tmp_path), torch.randn(3, 4, 8)
    mapped = load_tuned_lens(tmp_path)(load_model(LMSpec()), streams)
    for layer in range(3):
        linear = torch.nn.Linear(8, 8)
        linear.load_state_dict({"weight": state[f"{layer}.weight"], "bias": state[f"{layer}.bias"]})
        assert_close(mapped[layer], streams[layer] + linear(streams[layer]))
    tuned_lens(tmp_path, bias=False)
    assert load_tuned_lens(tmp_path).bias.abs().max() == 0


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "params.pt").unlink(),
            "does not hold a tuned lens; expected config.json and params.pt",
        ),
        (lambda folder: (folder / "params.pt").write_bytes(b"PK\x03\x04"), "is damaged, or holds more than tensors"),
        (lambda folder: torch.save({"0.weight": Code()}, folder / "params.pt"), "is damaged, or holds more"),
        (lambda folder: torch.save([1], folder / "params.pt"), "has no tensor '0.weight'"),
        (lambda folder: tuned_lens(folder, d_model=9), r"expected .* of shape \[9, 9\]"),
        (lambda folder: tuned_lens(folder, num_hidden_layers="3"), "num_hidden_layers is '3'; expected a size"),
        (lambda folder: tuned_lens(folder, num_hidden_layers=4), "has no tensor '3.weight'"),
    ],
)
def test_damaged_tuned_lenses_are_told(tmp_path, damage, message, capsys):
    tuned_lens(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtefactError, match=message):
        load_tuned_lens(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_names_and_layers_are_checked():
    with pytest.raises(ConfigurationError, match=r"lenses names 'oka'\. Did you mean oca\?"):
        check_lens_kinds("lenses", ["oka"])
    with pytest.raises(ConfigurationError, match=r"lenses names 'mean'"):
        check_lens_kinds("lenses", ["mean"], trained=True)
    with pytest.raises(ConfigurationError, match=r"'linear_oca', which is trained to match 'oca': name that too"):
        check_lens_kinds("lenses", ["linear_oca"], trained=True)
    with pytest.raises(ConfigurationError, match=r"lenses is \['oca', 'oca'\]"):
        check_lens_kinds("lenses", ["oca", "oca"])
    assert check_layers(None, 3) == [0, 1, 2]
    for layers in ([3], [1, 0], [], [0, 0], [-1]):
        with pytest.raises(ConfigurationError, match="expected ascending numbers from 0 to 2"):
            check_layers(layers, 3)
