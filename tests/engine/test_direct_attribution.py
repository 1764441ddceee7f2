"""Direct logit attribution: its terms add up to the logit difference, in every family."""

import pytest
import torch
from torch.testing import assert_close

from oa_train.engine.direct_attribution import direct_attribution
from oa_train.engine.forward import scored_logits
from oa_train.errors import ConfigurationError
from oa_train.metrics.measures import measured
from oa_train.models.hooks import Tap
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from tests.builders import random_batch, traces, with_spans
from tests.engine.selections import plain_kinds

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def terms(model, batch, *kinds: str) -> torch.Tensor:
    return direct_attribution(model, batch, Nodes.of(model.config, kinds))


@pytest.fixture
def model(any_model, monkeypatch):
    """A model whose logits are linear in what the final norm returns: soft-capping is taken away."""
    if getattr(any_model.config, "final_logit_softcapping", None):
        monkeypatch.setattr(any_model.config, "final_logit_softcapping", None)
    return any_model


def logit_difference(model, batch, *taps: Tap) -> torch.Tensor:
    logits = scored_logits(model, batch, taps)
    return measured("logit_difference", logits, logits, batch)


def of_biases(model, batch) -> torch.Tensor:
    """The logit difference that is left if nothing is written: those of the final norm and of the unembedding."""
    norm = find_parts(model).final_norm
    return logit_difference(model, batch, Tap(norm, "output", lambda normed: norm.forward(torch.zeros_like(normed))))


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_written_adds_up_to_the_logit_difference(model, side):
    batch = random_batch([7, 5], side)
    written = terms(model, batch, "embedding", "attention", "mlp").sum(dim=1)
    assert_close(written + of_biases(model, batch), logit_difference(model, batch), **EXACT)


@pytest.mark.parametrize(("parts", "whole"), [("heads", "attention"), ("neurons", "mlp")])
def test_units_of_a_layer_add_up_to_it_but_for_the_bias_of_their_projection(model, parts, whole):
    if parts not in plain_kinds(model):
        with pytest.raises(ConfigurationError, match="no sites of the kind 'neurons'"):
            terms(model, random_batch([7, 5]), parts)
        return
    batch, found = random_batch([7, 5]), find_parts(model)
    projections = found.attention_outputs if parts == "heads" else found.down_projections
    biases = [bias for projection in projections if (bias := projection.bias) is not None]
    kept = [bias.clone() for bias in biases]
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
    try:
        n_layers, of_units = len(found.blocks), terms(model, batch, parts)
        assert_close(of_units.unflatten(1, (n_layers, -1)).sum(2), terms(model, batch, whole), **EXACT)
    finally:
        with torch.no_grad():
            for bias, value in zip(biases, kept, strict=True):
                bias.copy_(value)


def test_a_unit_that_nothing_reads_later_is_worth_its_term(archetype):
    """The last MLP's term is what its removal costs if the scale of the final norm stays that of the clean run."""
    batch, parts = random_batch([6, 4]), find_parts(archetype)
    clean = {}
    scored_logits(archetype, batch, [Tap(parts.final_norm, "input", lambda x: clean.update(input=x))])
    scored_logits(archetype, batch, [Tap(parts.final_norm, "output", lambda x: clean.update(output=x))])
    written = {}
    scored_logits(archetype, batch, [Tap(parts.mlps[-1], "output", lambda x: written.update(mlp=x))])
    bias = parts.final_norm(torch.zeros_like(clean["input"]))
    mean = (lambda x: x.mean(-1, keepdim=True)) if hasattr(parts.final_norm, "normalized_shape") else (lambda x: 0)
    centred = clean["input"] - mean(clean["input"])
    per_unit = (clean["output"] - bias) / centred  # scale times gain in each dimension
    lost = (written["mlp"] - mean(written["mlp"])) * per_unit
    step = 1e-6  # small, for the linearisation where logits are capped
    plus, minus = (
        logit_difference(archetype, batch, Tap(parts.final_norm, "output", lambda x, s=s: x + s * lost))
        for s in (step, -step)
    )
    term = terms(archetype, batch, "mlp")[:, -1]
    assert_close(term, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-8)
    assert (term.abs() > 1e-4).any()


def test_a_span_counts_only_where_it_is_scored_and_kinds_that_write_nothing_have_no_term(archetype):
    batch = with_spans(random_batch([6, 6]), s=(2, 3))
    level = Nodes.of(archetype.config, ["mlp", "residual"], ["m1@s", "m1@-1"])
    names, found = level.names, direct_attribution(archetype, batch, level)
    everywhere = terms(archetype, batch, "mlp")[:, 1]
    assert torch.equal(found[:, names.index("m1@s")], torch.zeros(2, dtype=torch.float64))
    assert_close(found[:, names.index("m1@-1")], everywhere, **EXACT)
    assert found[:, names.index("r1")].isnan().all()


def test_the_model_is_left_as_it_was(archetype):
    before = traces(archetype)
    terms(archetype, random_batch([5, 4]), "heads", "mlp")
    assert traces(archetype) == before
