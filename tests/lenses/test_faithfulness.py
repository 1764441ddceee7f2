"""Changes of the residual stream: loops over rows and directions, and what a faithful lens would score."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from oa_train.engine.forward import scored_logits
from oa_train.errors import TaskError
from oa_train.lenses.faithfulness import (
    Intervened,
    StreamStatistics,
    calibrated_step,
    layers_between,
    log_change_similarity,
    projected,
    resampled,
    steered,
)
from oa_train.lenses.lens import LogitLens
from oa_train.models.hooks import Tap
from oa_train.models.parts import find_parts
from tests.builders import random_batch

EXACT = {"rtol": 0, "atol": 1e-10}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def units(n, width, seed=1):
    return torch.nn.functional.normalize(normal(n, width, seed=seed), dim=-1)


def test_projection_removes_each_rows_own_component():
    streams, directions, mean = normal(5, 8), units(3, 8), normal(8, seed=2)
    changed = projected(streams, directions, mean)
    for d, v in enumerate(directions):
        for row, x in enumerate(streams):
            assert_close(changed[d, row], x - ((x - mean) @ v) * v, **EXACT)
            assert abs((changed[d, row] - mean) @ v) < 1e-10


def test_resampling_swaps_the_component_in_a_subspace():
    streams, directions = normal(5, 8), units(4, 8)
    changed = resampled(streams, directions, 2)
    assert changed.shape == (2, 5, 8)
    basis = torch.linalg.qr(directions[:2].mT)[0]
    for row in range(5):
        inside = basis.mT @ changed[0, row]
        assert_close(inside, basis.mT @ streams[(row + 1) % 5], **EXACT)
        outside = changed[0, row] - basis @ inside
        assert_close(outside, streams[row] - basis @ (basis.mT @ streams[row]), **EXACT)


def test_steering_moves_along_the_direction_by_a_step_of_each_row():
    streams, directions = normal(5, 8), units(3, 8)
    moved = steered(streams, directions, 0.5, 1) - streams
    lengths = (moved * directions.unsqueeze(1)).sum(-1)
    assert_close(moved, lengths.unsqueeze(-1) * directions.unsqueeze(1), **EXACT)
    assert len(lengths.flatten().unique()) == 15
    assert torch.equal(steered(streams, directions, 0.5, 1), streams + moved)
    assert_close(steered(streams, directions, 1.0, 1) - streams, 2 * moved, **EXACT)


def test_statistics_are_those_of_the_stream_and_directions_follow_them():
    streams = normal(4000, 3) @ torch.diag(torch.tensor([5.0, 1.0, 0.1], dtype=torch.float64)) + 2
    statistics = StreamStatistics.of(streams)
    assert_close(statistics.mean, streams.mean(dim=0))
    covariance = statistics.factor @ statistics.factor.mT - 3e-4 * torch.eye(3, dtype=torch.float64)
    assert_close(covariance, torch.cov(streams.mT), **EXACT)
    directions = statistics.random_directions(200, 1)
    assert_close(directions.norm(dim=1), torch.ones(200, dtype=torch.float64))
    assert (directions[:, 0].abs() > directions[:, 2].abs()).double().mean() > 0.9
    (basis,) = statistics.basis(torch.diag(torch.tensor([0.0, 0.0, 1.0])), 1)
    assert basis[2].abs() > 0.9  # the only direction that this lens sees


def test_an_unchanged_stream_changes_nothing_and_a_changed_one_what_a_hook_does(archetype):
    batch = random_batch([7, 5], "left")
    prompts, streams = Intervened(archetype, batch, 1, 3), normal(2, 2, 32)
    unchanged = prompts.logits(prompts.streams.expand(3, -1, -1))
    assert_close(unchanged, scored_logits(archetype, batch)[:, 0].expand_as(unchanged), **EXACT)
    assert prompts.model_effects(prompts.streams.unsqueeze(0)).abs().max() < 1e-10
    for number, change in enumerate(streams):

        def put(tensor, change=change):
            changed = tensor.clone()
            changed[:, -1] = change
            return changed

        expected = scored_logits(archetype, batch, [Tap(find_parts(archetype).blocks[1], "input", put)])
        assert_close(prompts.logits(streams)[number], expected[:, 0], **EXACT)
    effects = prompts.effects(LogitLens([1], 3, 32), streams, prompts.logits(streams))
    assert effects.model.shape == effects.lens.shape == effects.similarity.shape == (2, 2)


def test_the_similarity_is_one_for_the_same_change_up_to_a_factor():
    clean, changed = normal(4, 9), normal(3, 4, 9, seed=1)
    assert_close(log_change_similarity(clean, changed, clean, changed), torch.ones(3, 4, dtype=torch.float64))
    half = clean + 0.5 * (changed - clean) + 7
    assert_close(log_change_similarity(clean, changed, clean, half), torch.ones(3, 4, dtype=torch.float64))
    opposite = clean - (changed - clean)
    assert_close(log_change_similarity(clean, changed, clean, opposite), -torch.ones(3, 4, dtype=torch.float64))
    other = log_change_similarity(clean, changed, clean, normal(3, 4, 9, seed=2))
    assert other.abs().max() < 1


def test_the_step_is_calibrated_to_just_below_the_target():
    assert calibrated_step(lambda step: step**2, 0.25, 2.0) == pytest.approx(0.5, abs=0.01)
    assert calibrated_step(lambda step: step**2, 0.25, 8.0) < 0.5
    assert calibrated_step(lambda step: 0.0, 0.25, 8.0) > 7.9


def test_layers_in_between_are_spread_over_the_model():
    assert list(layers_between(list(range(12)), 4)) == [2, 5, 7, 10]
    assert list(layers_between([0, 1, 2], 4)) == [1, 2]
    assert list(layers_between([3], 4)) == [3]


def test_prompts_that_are_scored_at_several_positions_are_refused(archetype):
    batch, none = random_batch([6]), torch.full((1, 2, 1), -1)
    several = {"scored": torch.tensor([[3, 4]]), "weights": torch.full((1, 2), 0.5), "answers": none}
    with pytest.raises(TaskError, match=r"Streams are changed at one token of each prompt.*at 2\."):
        Intervened(archetype, replace(batch, **several, distractors=none), 1, 8)
