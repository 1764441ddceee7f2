"""Fitting constants: it helps, circuits do not touch each other, and what does better is kept."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import AblationSource
from oa_train.engine.reading import source_means
from oa_train.errors import ConfigurationError, NotFiniteError
from oa_train.metrics.measures import Loss
from oa_train.models.families import Dimensions
from oa_train.models.graph import Graph
from oa_train.models.loading import LMSpec, load_model
from oa_train.models.selection import Components
from tests.builders import small_ioi


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def task():
    return small_ioi(n_validation=64)


@pytest.fixture(scope="module")
def mean(model, task):
    return source_means(model, task.batches("means", 64, 32), task.bos_token_id).table(1)


def masks_of(model, *patterns: str) -> torch.Tensor:
    components = Components.of(Dimensions.of(model.config))
    return torch.stack([components.mask(components.select(pattern.split())) for pattern in patterns])


def test_fitted_constants_beat_the_mean_on_held_out_prompts(model, task, mean):
    masks = masks_of(model, "* !a0.h0", "a0* a1* m0")
    start = fit_constants(model, task, masks, [mean], RefitSettings(steps=0)).validation_loss
    fitted = fit_constants(model, task, masks, [mean], RefitSettings(steps=60, batch_size=16, evaluate_every=20))
    assert (fitted.validation_loss < 0.8 * start).all()
    # They ablate nothing in common, so one table holds the constants of both.
    assert len(fitted.sets) == 1
    (moved,) = ((fitted.sets[0].heads != mean.heads).any(dim=-1).squeeze(1),)
    assert moved.nonzero().tolist() == [[0, 0], [2, 0], [2, 1], [2, 2], [2, 3]]


def test_circuits_side_by_side_equal_circuits_one_after_another(model, task, mean):
    masks = masks_of(model, "* !a0.h0", "* !m1", "a0* a1* m0")
    settings = RefitSettings(steps=8, batch_size=4, evaluate_every=4)
    together = fit_constants(model, task, masks, [mean], settings)
    chunked = fit_constants(model, task, masks, [mean], replace(settings, rows_per_run=8))
    for index in range(len(masks)):
        alone = fit_constants(model, task, masks[index : index + 1], [mean], settings)
        for fitted in (together, chunked):
            assert_close(fitted.sets[index].heads, alone.sets[0].heads, rtol=0, atol=1e-5)
            assert_close(fitted.sets[index].mlps, alone.sets[0].mlps, rtol=0, atol=1e-5)
            assert_close(fitted.validation_loss[index], alone.validation_loss[0], rtol=0, atol=1e-5)


def test_only_constants_of_ablated_components_move(model, task, mean):
    masks = masks_of(model, "* !a1.h2 !m0")
    fitted = fit_constants(model, task, masks, [mean], RefitSettings(steps=2, batch_size=4, evaluate_every=1)).sets[0]
    moved = (fitted.heads != mean.heads).any(dim=-1).squeeze(1)
    assert moved.nonzero().tolist() in ([[1, 2]], [])
    moved_mlps = (fitted.mlps != mean.mlps).any(dim=-1).squeeze(1)
    assert moved_mlps.nonzero().flatten().tolist() in ([0], [])


@pytest.mark.parametrize("loss", get_args(Loss))
def test_each_loss_is_what_is_minimised_and_what_is_told(model, task, mean, loss):
    masks = masks_of(model, "* !a0.h0", "a0* a1* m0")
    settings = RefitSettings(steps=40, batch_size=8, evaluate_every=20)
    start = fit_constants(model, task, masks, [mean], replace(settings, steps=0), loss=loss)
    fitted = fit_constants(model, task, masks, [mean], settings, loss=loss)
    assert (fitted.validation_loss < start.validation_loss).all()
    batches = list(task.batches("validation", task.n_validation))
    for found in (start, fitted):
        told = circuit_behaviour(model, batches, masks, found.sets).loss(loss).mean(dim=1)
        assert_close(found.validation_loss, told, rtol=0, atol=1e-5)


def test_what_does_better_on_validation_is_kept(model, task, mean):
    masks = masks_of(model, "* !a2.h0")
    zero = Constants.zeros(Dimensions.of(model.config), task.bos_token_id)
    far = replace(mean, heads=mean.heads + 50.0, mlps=mean.mlps + 50.0)
    kept = fit_constants(model, task, masks, [far], RefitSettings(steps=0), others=[zero])
    assert not kept.sets[0].heads[2, :, 0].any()


def test_what_is_not_a_number_is_never_kept(model, task, mean):
    bad = replace(mean, heads=torch.full_like(mean.heads, float("nan")))
    kept = fit_constants(model, task, masks_of(model, "* !a0.h0"), [mean], RefitSettings(steps=0), others=[bad])
    assert torch.equal(kept.sets[0].heads, mean.heads)
    assert kept.validation_loss.isfinite().all()


def test_the_same_call_gives_the_same_constants(model, task, mean):
    masks = masks_of(model, "* !m0")
    settings = RefitSettings(steps=5, batch_size=4, evaluate_every=5)
    first, second = (fit_constants(model, task, masks, [mean], settings) for _ in range(2))
    assert torch.equal(first.sets[0].mlps, second.sets[0].mlps)


def test_progress_is_told(model, task, mean):
    told = []

    def track(steps, description):
        told.append((len(steps), description))
        return steps

    masks = masks_of(model, "* !m0")
    fit_constants(model, task, masks, [mean], RefitSettings(steps=3, batch_size=2), track=track, description="here")
    assert told == [(3, "here")]


def test_a_loss_that_is_not_finite_stops_the_fit(model, task, mean):
    bad = replace(mean, mlps=torch.full_like(mean.mlps, float("nan")))
    with pytest.raises(NotFiniteError, match="at step 0 of the refit"):
        fit_constants(model, task, masks_of(model, "* !m0"), [bad], RefitSettings(steps=1, batch_size=2))


@pytest.mark.parametrize(
    "changes",
    [{"steps": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"evaluate_every": 0}, {"rows_per_run": 0}],
)
def test_settings_that_cannot_work_are_refused(changes):
    with pytest.raises(ConfigurationError, match=f"{next(iter(changes))} is"):
        RefitSettings(**changes)


def test_prompts_that_do_not_fit_into_one_run_have_the_same_gradient(monkeypatch):
    task = small_ioi()
    model = load_model(task.lm)
    graph = Graph.of(model.config)
    masks = torch.rand(2, len(graph), generator=torch.Generator().manual_seed(0)) < 0.7
    settings = RefitSettings(steps=2, batch_size=7, evaluate_every=1)
    starts = [AblationSource(model, task).mean]
    whole = fit_constants(model, task, masks, starts * 2, settings)
    monkeypatch.setattr("oa_train.engine.levels.RUN_BYTES", 2**20)
    pieces = fit_constants(model, task, masks, starts * 2, settings)
    for one, other in zip(whole.sets, pieces.sets, strict=True):
        for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
            assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
