"""Causal tracing: the laws of restoring and corrupting, and a slow reference, on every archetype in float64."""

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.noise import AddedNoiseAblation
from oa_train.ablations.tracing import (
    CORRUPTED,
    Tracer,
    Tracing,
    answer_probability,
    corrupted_by,
    corrupted_by_constants,
    tokens_level,
)
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import copies_logits
from oa_train.engine.reading import read_values
from oa_train.engine.values import Values
from oa_train.errors import ConfigurationError, TaskError
from oa_train.models.hooks import Tap
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from tests.builders import random_batch, random_constants, with_spans

EXACT = {"rtol": 0, "atol": 1e-10}
SPANS = ("-1", "subject", "subject_last", "subject_next", "every")
ABLATION_KINDS = ("attention", "mlp", "residual")


def prompts(side="right"):
    return with_spans(random_batch([8, 6], side), subject=(2, 3))


def constants_of(tracing, model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(tracing), model.config.hidden_size, dtype=torch.float64, generator=generator)


def corrupted_logits(model, batch, constant, restored=()):
    """Logits with the subject's embeddings replaced; `restored` are modules, columns and clean outputs."""
    inside, parts = batch.spans["subject"], find_parts(model)

    def corrupt(tensor):
        return torch.where(inside.unsqueeze(-1), constant, tensor)

    taps = [Tap(parts.token_embedding, "output", corrupt)]
    for module, side, where, clean in restored:
        taps.append(Tap(module, side, lambda tensor, where=where, clean=clean: torch.where(where, clean, tensor)))
    return scored_logits(model, batch, taps)


def places(model, run, n_layers):
    parts = find_parts(model)
    for layer in run.layers(n_layers):
        if run.kind == "attention":
            yield Site("attention", layer), parts.attentions[layer], "output"
        elif run.kind == "mlp":
            yield Site("mlp", layer), parts.mlps[layer], "output"
        else:
            after = parts.final_norm if layer + 1 == n_layers else parts.blocks[layer + 1]
            yield Site("residual", layer + 1), after, "input"


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_run_equals_hooks_one_by_one_in_value_and_gradient(archetype, side):
    batch, tracing = prompts(side), Tracing(3, (0, 1, 2), ABLATION_KINDS, SPANS, (1, 3))
    tracer, constants = Tracer(archetype, tracing, 1000), constants_of(tracing, archetype).requires_grad_()
    (piece,) = tracer.pieces(batch)
    logits = piece.logits(slice(None), constants[:, None, None]).unflatten(0, (len(tracing), len(batch)))
    clean = read_values(archetype, batch, Nodes.of(archetype.config, ABLATION_KINDS))
    slow = []
    for number in range(len(tracing)):
        restored = []
        if number < len(tracing.runs):
            run = tracing.runs[number]
            where = (batch.layout.span(run.span) & ~batch.protected).unsqueeze(-1)
            restored = [
                (module, side, where, clean[site][:, :, 0]) for site, module, side in places(archetype, run, 3)
            ]
        slow.append(corrupted_logits(archetype, batch, constants[number], restored))
    assert_close(logits, torch.stack(slow), **EXACT)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    fast_gradient, slow_gradient = (
        torch.autograd.grad((values * weights).sum(), constants)[0] for values in (logits, torch.stack(slow))
    )
    assert_close(fast_gradient, slow_gradient, **EXACT)
    assert fast_gradient.abs().amax(dim=1).gt(0).sum() > len(tracing) / 2


def test_restoring_the_whole_residual_stream_is_the_clean_run(archetype):
    batch, tracing = prompts("left"), Tracing(3, (0, 1, 2), ("residual",), ("every",))
    (piece,) = Tracer(archetype, tracing).pieces(batch)
    logits = piece.logits(slice(None), constants_of(tracing, archetype)[:, None, None])
    by_run = logits.unflatten(0, (len(tracing), len(batch)))
    clean = scored_logits(archetype, batch)
    for number in range(3):
        assert_close(by_run[number], clean, **EXACT)
    assert (by_run[3] - clean).abs().max() > 1e-3  # the run that restores nothing


def test_restoring_all_attention_and_all_mlps_is_the_clean_run_outside_the_subject(archetype):
    batch, tracing = prompts(), Tracing(3, (0, 1, 2), ("attention", "mlp"), ("every",), (7,))
    tracer = Tracer(archetype, tracing)
    attention, mlp = tracer.masks[1], tracer.masks[4]  # of the middle layers
    values = read_values(archetype, batch, tracer.level)
    corrupted = constants_of(tracing, archetype)[:1, None, None].expand(len(batch), -1, -1, -1)
    values = Values({**values, CORRUPTED: corrupted})
    logits = copies_logits(archetype, batch, tracer.level, (attention & mlp).unsqueeze(0), values)
    assert_close(logits, scored_logits(archetype, batch), **EXACT)


def test_probabilities_do_not_depend_on_pieces_or_padding(archetype):
    tracing = Tracing(3, (0, 1, 2), ("attention", "residual"), ("-1", "subject_last"), (3,))
    constants = constants_of(tracing, archetype)
    results = [
        Tracer(archetype, tracing, rows).probabilities(prompts(side), corrupted_by_constants(constants))
        for rows, side in ((128, "right"), (5, "right"), (1, "left"))
    ]
    assert results[0].shape == (len(tracing), 2)
    for result in results[1:]:
        assert_close(result, results[0], **EXACT)
    clean = answer_probability(scored_logits(archetype, prompts()), prompts())
    assert (results[0] - clean).abs().max() > 1e-4


def test_noise_is_added_to_the_clean_embedding_with_one_deviation(archetype):
    batch, level = prompts("left"), tokens_level(archetype.config)
    means, spread = random_constants(level, seed=1), random_constants(level, seed=2).mapped(torch.abs)
    noise = AddedNoiseAblation.of_spread(means, spread, 3.0, seed=5)
    corruption = corrupted_by(noise, archetype, level)(batch, slice(0, 1))
    assert corruption.shape[:2] == (1, len(batch))
    clean = read_values(archetype, batch, level)[CORRUPTED][:, :, 0]
    draw = (corruption[0] - clean)[batch.attention_mask]
    mean, variance = means.tables[CORRUPTED][0, 0], spread.tables[CORRUPTED][0, 0] ** 2
    expected = 3 * ((variance + mean**2).mean() - mean.mean() ** 2).sqrt()
    assert abs(float(draw.std() / expected) - 1) < 0.1
    again = corrupted_by(noise, archetype, level)(prompts("right"), slice(0, 1))
    width = int(batch.lengths[1])
    assert_close(again[0, 1, :width], corruption[0, 1, -width:], **EXACT)
    other = AddedNoiseAblation.of_spread(means, spread, 3.0, seed=6)
    assert not torch.equal(corrupted_by(other, archetype, level)(batch, slice(0, 1)), corruption)


def test_descriptions_rebuild_the_tracing():
    tracing = Tracing(3, (0, 1, 2), ("attention",), ("-1", "every"), (1, 5), "name")
    assert Tracing.of_description(tracing.describe()) == tracing
    assert len(tracing) == 1 + 2 * 2 * 3
    assert [list(run.layers(3)) for run in tracing.runs[3:6]] == [[0, 1, 2]] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("attentions",)}, r"restore names 'attentions'\. Did you mean attention\?"),
        ({"windows": (2,)}, "windows names 2; expected odd numbers of layers"),
        ({"layers": (1, 0)}, r"layers is \[1, 0\]; expected ascending numbers from 0 to 2"),
        ({"layers": (3,)}, r"layers is \[3\]"),
        ({"windows": ()}, r"windows is \[\]"),
        ({"spans": ("-1", "-1")}, r"at is \['-1', '-1'\]; expected at least one, each once"),
    ],
)
def test_tracings_that_cannot_work_are_refused(changes, message):
    arguments = {"n_layers": 3, "layers": (0, 1, 2), "kinds": ("attention",), "spans": ("-1",)} | changes
    with pytest.raises(ConfigurationError, match=message):
        Tracing(**arguments)


def test_prompts_without_a_subject_are_refused(archetype):
    tracer = Tracer(archetype, Tracing(3, (0, 1, 2), ("mlp",), ("-1",)))
    with pytest.raises(TaskError, match="There is no span 'subject' in these prompts"):
        tracer.probabilities(random_batch([5, 4]), corrupted_by_constants(torch.zeros(4, 32, dtype=torch.float64)))
