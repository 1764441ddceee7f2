"""Fitting constants: it helps, circuits do not touch each other, and what does better is kept."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import AblationSource
from oa_train.errors import ConfigurationError, NotFiniteError
from oa_train.metrics.measures import Loss
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec
from oa_train.progress import Track
from tests.builders import small_ioi


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def task():
    return small_ioi(n_validation=64)


@pytest.fixture(scope="module")
def level(model):
    return Nodes.of(model.config)


@pytest.fixture(scope="module")
def mean(model, task, level):
    return AblationSource(model, task, level).mean


def masks_of(level: Nodes, *patterns: str) -> torch.Tensor:
    return torch.stack([level.selected(pattern.split()) for pattern in patterns])


def moved(fitted: Constants, start: Constants) -> set[str]:
    """Units whose constant is not the one that training started from."""
    return {
        f"{site.key}.{unit}"
        for site, table in fitted.tables.items()
        for unit in (table != start.tables[site]).any(dim=2).any(dim=0).nonzero().flatten().tolist()
    }


def test_fitted_constants_beat_the_mean_on_held_out_prompts(model, task, level, mean):
    masks = masks_of(level, "* !a0.h0", "a0* a1* m0")
    start = fit_constants(model, task, level, masks, [mean], RefitSettings(steps=0)).validation_loss
    fitted = fit_constants(
        model, task, level, masks, [mean], RefitSettings(steps=60, batch_size=16, evaluate_every=20)
    )
    assert (fitted.validation_loss < 0.8 * start).all()
    # They ablate nothing in common, so one table holds the constants of both.
    assert len(fitted.sets) == 1
    assert moved(fitted.sets[0], mean) == {"heads_0.0", "mlp_1.0", *(f"heads_2.{n}" for n in range(4)), "mlp_2.0"}


def test_circuits_side_by_side_equal_circuits_one_after_another(model, task, level, mean):
    masks = masks_of(level, "* !a0.h0", "* !m1", "a0* a1* m0")
    settings = RefitSettings(steps=8, batch_size=4, evaluate_every=4)
    together = fit_constants(model, task, level, masks, [mean], settings)
    chunked = fit_constants(model, task, level, masks, [mean], replace(settings, rows_per_run=8))
    for index in range(len(masks)):
        alone = fit_constants(model, task, level, masks[index : index + 1], [mean], settings)
        for fitted in (together, chunked):
            for site, table in fitted.sets[index].tables.items():
                # Adam divides by small gradients, which amplifies their rounding.
                assert_close(table, alone.sets[0].tables[site], rtol=0, atol=5e-5)
            assert_close(fitted.validation_loss[index], alone.validation_loss[0], rtol=0, atol=1e-5)


def test_only_constants_of_ablated_components_move(model, task, level, mean):
    masks = masks_of(level, "* !a1.h2 !m0")
    fitted = fit_constants(model, task, level, masks, [mean], RefitSettings(steps=2, batch_size=4, evaluate_every=1))
    # The mean itself may have stayed the best.
    assert moved(fitted.sets[0], mean) in ({"mlp_0.0", "heads_1.2"}, set())


@pytest.mark.parametrize("loss", get_args(Loss))
def test_each_loss_is_what_is_minimised_and_what_is_told(model, task, level, mean, loss):
    masks = masks_of(level, "* !a0.h0", "a0* a1* m0")
    settings = RefitSettings(steps=40, batch_size=8, evaluate_every=20)
    start = fit_constants(model, task, level, masks, [mean], replace(settings, steps=0), loss=loss)
    fitted = fit_constants(model, task, level, masks, [mean], settings, loss=loss)
    assert (fitted.validation_loss < start.validation_loss).all()
    batches = list(task.batches("validation", task.n_validation))
    for constants in (start, fitted):
        measured = circuit_behaviour(model, batches, level, masks, constants.sets).loss(loss).mean(dim=1)
        assert_close(constants.validation_loss, measured, rtol=0, atol=1e-5)


def test_what_does_better_on_validation_is_kept(model, task, level, mean):
    masks = masks_of(level, "* !a2.h0")
    zero, far = Constants.zeros(level), mean.mapped(lambda table: table + 50.0)
    kept = fit_constants(model, task, level, masks, [far], RefitSettings(steps=0), others=[zero])
    assert not kept.sets[0].tables[Site("heads", 2)][:, 0].any()


def test_what_is_not_a_number_is_never_kept(model, task, level, mean):
    bad = mean.mapped(lambda table: torch.full_like(table, float("nan")))
    kept = fit_constants(model, task, level, masks_of(level, "* !a0.h0"), [mean], RefitSettings(steps=0), others=[bad])
    assert not moved(kept.sets[0], mean)
    assert kept.validation_loss.isfinite().all()


def test_the_same_call_gives_the_same_constants(model, task, level, mean):
    masks = masks_of(level, "* !m0")
    settings = RefitSettings(steps=5, batch_size=4, evaluate_every=5)
    first, second = (fit_constants(model, task, level, masks, [mean], settings) for _ in range(2))
    assert not moved(first.sets[0], second.sets[0])


def test_progress_is_told(model, task, level, mean):
    told = []

    class Told(Track):
        @contextmanager
        def __call__(self, passes, description):
            told.append([passes, 0, description])
            yield partial(self.count, told[-1])

        def count(self, stage, done):
            stage[1] += done

    masks = masks_of(level, "* !m0")
    fit_constants(
        model, task, level, masks, [mean], RefitSettings(steps=3, batch_size=2), track=Told(), description="here"
    )
    # One circuit: the start and the end on the validation prompts, and three steps of two prompts with gradients.
    passes = 2 * task.n_validation + 2 * 3 * 2
    assert told == [[passes, passes, "here"]]


def test_a_loss_that_is_not_finite_stops_the_fit(model, task, level, mean):
    bad = mean.mapped(lambda table: torch.full_like(table, float("nan")))
    with pytest.raises(NotFiniteError, match="at step 0 of the refit"):
        fit_constants(model, task, level, masks_of(level, "* !m0"), [bad], RefitSettings(steps=1, batch_size=2))


@pytest.mark.parametrize(
    "changes",
    [{"steps": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"evaluate_every": 0}, {"rows_per_run": 0}],
)
def test_settings_that_cannot_work_are_refused(changes):
    with pytest.raises(ConfigurationError, match=f"{next(iter(changes))} is"):
        RefitSettings(**changes)


def test_prompts_that_do_not_fit_into_one_run_have_the_same_gradient(model, task, monkeypatch):
    graph = Graph.of(model.config)
    masks = torch.rand(2, len(graph), generator=torch.Generator().manual_seed(0)) < 0.7
    settings = RefitSettings(steps=2, batch_size=7, evaluate_every=1)
    starts = [AblationSource(model, task, graph).mean]
    whole = fit_constants(model, task, graph, masks, starts * 2, settings)
    monkeypatch.setattr("oa_train.engine.chunks.RUN_BYTES", 2**20)
    pieces = fit_constants(model, task, graph, masks, starts * 2, settings)
    for constants, other in zip(whole.sets, pieces.sets, strict=True):
        for site, table in constants.tables.items():
            assert_close(table, other.tables[site], rtol=1e-4, atol=1e-5)


def test_units_of_other_kinds_and_spans_have_constants_of_their_own(model, task):
    kinds, patterns = ["attention", "neurons", "mlp"], ["m1@S2", "m1@end", "m2.n?@S2", "a0@-1"]
    level = Nodes.of(model.config, kinds, patterns)
    start = AblationSource(model, task, level).mean
    masks = masks_of(level, "* !m1@S2", "* !m1@end !m0.n3")
    fitted = fit_constants(
        model, task, level, masks, [start], RefitSettings(steps=30, batch_size=16, evaluate_every=10)
    )
    unfitted = fit_constants(model, task, level, masks, [start], RefitSettings(steps=0))
    assert (fitted.validation_loss < unfitted.validation_loss).all()
    # The same unit at two spans: no two circuits replace the same value, so one table serves both.
    (constants,) = fitted.sets
    assert moved(constants, start) == {"neurons_0.3", "mlp_1.0"}
    slots = (constants.tables[Site("mlp", 1)] != start.tables[Site("mlp", 1)]).any(dim=2).squeeze(1)
    assert {level.spans[slot] for slot in slots.nonzero().flatten().tolist()} == {"S2", "end"}


def test_a_circuit_that_replaces_nothing_needs_no_steps(model, task, level, mean):
    settings = RefitSettings(steps=2, batch_size=2, evaluate_every=1)
    fitted = fit_constants(model, task, level, masks_of(level, "*"), [mean], settings)
    assert fitted.validation_loss.abs().max() < 1e-6
    assert moved(fitted.sets[0], mean) == set()


def test_circuits_that_no_longer_improve_stop_and_leave_the_others_alone(model, task, level, mean):
    masks = masks_of(level, "* !a0.h0", "* !m1", "a0* a1* m0", "*")
    settings = RefitSettings(steps=24, batch_size=4, evaluate_every=3, patience=1)
    together = fit_constants(model, task, level, masks, [mean], settings)
    to_the_end = fit_constants(model, task, level, masks, [mean], replace(settings, patience=0))
    assert (together.validation_loss >= to_the_end.validation_loss - 1e-6).all()
    assert (together.validation_loss > to_the_end.validation_loss + 1e-4).any()
    for index in range(len(masks)):
        alone = fit_constants(model, task, level, masks[index : index + 1], [mean], settings)
        assert_close(together.validation_loss[index], alone.validation_loss[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_ends_when_no_circuit_improves(model, task, level, mean, monkeypatch, patience):
    steps, batch = [], task.batch
    monkeypatch.setattr(task, "batch", lambda stream, step, size: steps.append(step) or batch(stream, step, size))
    settings = RefitSettings(steps=40, batch_size=2, evaluate_every=2, patience=patience, learning_rate=1e-9)
    fit_constants(model, task, level, masks_of(level, "* !m1", "* !a0"), [mean], settings)
    assert steps == [*range(2 * patience)]
