"""The end of a model on single tokens: exact with the model's own attention outputs, on every family."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.engine.forward import scored_logits
from oa_train.engine.tail import read_out, run_tail, scored_stream
from oa_train.models.hooks import Tap
from oa_train.models.parts import find_parts
from tests.builders import random_batch, traces

EXACT = {"rtol": 0, "atol": 1e-10}


def at_every_position(batch):
    """The batch, scored at three positions of each prompt."""
    scored = torch.stack([batch.attention_mask[row].nonzero().flatten()[[1, 2, -1]] for row in range(len(batch))])
    answers = torch.full((len(batch), 3, 1), -1)
    return replace(
        batch, scored=scored, weights=torch.full((len(batch), 3), 1 / 3, dtype=torch.float64),
        answers=answers, distractors=answers,
    )  # fmt: skip


def test_the_stream_at_scored_positions_is_the_models(any_model):
    batch = at_every_position(random_batch([7, 5], "left"))
    stream, parts = scored_stream(any_model, batch, attention=True), find_parts(any_model)
    assert_close(stream.logits, scored_logits(any_model, batch), **EXACT)
    seen = []
    scored_logits(any_model, batch, [Tap(parts.blocks[1], "input", lambda tensor: seen.append(tensor))])
    rows = torch.arange(2).unsqueeze(1)
    assert_close(stream.residuals[1], seen[0].view(2, 7, -1)[rows, batch.scored], **EXACT)
    assert stream.residuals.shape[0] == len(parts.blocks) + 1
    assert stream.attention.shape[0] == len(parts.blocks)


def test_reading_the_final_stream_out_is_the_model(any_model):
    batch, before = at_every_position(random_batch([7, 5])), traces(any_model)
    stream = scored_stream(any_model, batch)
    logits = read_out(any_model, stream.residuals[-1].flatten(0, 1))
    assert_close(logits.view_as(stream.logits), stream.logits, **EXACT)
    assert traces(any_model) == before


def test_with_its_own_attention_outputs_every_tail_is_the_model(any_model):
    batch, before = at_every_position(random_batch([7, 5], "left")), traces(any_model)
    stream = scored_stream(any_model, batch, attention=True)
    residuals, attention = stream.residuals.flatten(1, 2), stream.attention.flatten(1, 2)
    final = run_tail(any_model, residuals, range(4), lambda layer, starts: attention[layer].unsqueeze(0))
    for start in range(4):
        assert_close(final[start], residuals[-1], **EXACT)
    assert traces(any_model) == before


@pytest.mark.parametrize("starts", [[0, 1, 2, 3], [1, 2], [2], [3], [0, 3]])
def test_all_starts_at_once_equal_each_start_alone(archetype, starts):
    stream = scored_stream(archetype, random_batch([7, 5]))
    residuals, width = stream.residuals.flatten(1, 2)[starts], archetype.config.hidden_size
    table = torch.randn(4, 3, width, dtype=torch.float64, requires_grad=True)

    def of_table(layer, live):
        return table[live, layer].unsqueeze(1)

    together = run_tail(archetype, residuals, starts, of_table)
    alone = [run_tail(archetype, residuals[n : n + 1], [start], of_table)[0] for n, start in enumerate(starts)]
    assert_close(together, torch.stack(alone), **EXACT)
    weights = torch.linspace(-1, 1, together.numel(), dtype=torch.float64).view_as(together)
    gradients = []
    for final in (together, torch.stack(alone)):
        loss = (final * weights).sum()
        gradients.append(torch.autograd.grad(loss, table)[0] if loss.requires_grad else torch.zeros_like(table))
    assert_close(*gradients, **EXACT)
    used = torch.zeros(4, 3, dtype=torch.bool)
    for start in starts:
        used[start, start:] = True
    assert torch.equal(gradients[0].abs().amax(dim=-1) > 0, used)


def test_the_model_is_restored_after_an_exception(archetype):
    before, stream = traces(archetype), scored_stream(archetype, random_batch([5]))

    def fail(layer, starts):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_tail(archetype, stream.residuals.flatten(1, 2), range(4), fail)
    assert traces(archetype) == before
