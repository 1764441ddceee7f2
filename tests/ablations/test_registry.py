"""Every kind of ablation on the built-in model; means and spreads against plain ones over tokens."""

from functools import partial
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour, circuit_logits
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.means import StreamingMeans
from oa_train.ablations.registry import KINDS, AblationKind, AblationSource, check_kind
from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.engine.reading import source_means, source_values
from oa_train.errors import ConfigurationError
from oa_train.models.families import Dimensions
from oa_train.models.loading import LMSpec, load_model
from oa_train.models.selection import Components
from tests.builders import batch_of, small_ioi

LEARNED, CONSTANT, TOTAL = "optimal", {"optimal", "mean", "zero", "counterfactual_mean"}, {*KINDS} - {"counterfactual"}


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec(dtype="float64"))


@pytest.fixture(scope="module")
def source(model):
    return AblationSource(model, small_ioi())


def all_kept(model) -> torch.Tensor:
    return torch.ones(1, len(Components.of(Dimensions.of(model.config)))).bool()


def test_there_is_an_entry_for_each_kind_and_it_says_what_it_is():
    assert set(KINDS) == set(get_args(AblationKind))
    for name, kind in KINDS.items():
        assert kind.name == name
        assert kind.learned == (name == LEARNED)
        assert kind.constant == (name in CONSTANT)
        assert kind.total == (name in TOTAL)
        assert check_kind("ablation", name) is kind


def test_a_kind_that_there_is_not_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigurationError, match=r"ablation is 'resampel'. Did you mean .*resample"):
        check_kind("ablation", "resampel")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_with_everything_kept_each_kind_gives_the_models_own_logits(model, source, name, side):
    batch = small_ioi(padding_side=side).batch("test", 0, 5)
    ablation = KINDS[name].prepare(source)
    clean = scored_logits(model, batch)
    assert torch.equal(circuit_logits(model, batch, all_kept(model), [ablation]), clean)
    ablated = circuit_logits(model, batch, ~all_kept(model), [ablation])
    assert (ablated - clean).abs().max() > 1e-2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n_positions", [1, 4])
def test_each_kind_is_prepared_with_what_it_needs(source, name, n_positions):
    ablation = KINDS[name].prepare(AblationSource(source.model, source.task, n_positions))
    assert isinstance(ablation, Constants) == KINDS[name].constant
    assert ablation.bos_token_id == source.task.bos_token_id
    if isinstance(ablation, Constants):
        assert ablation.n_positions == n_positions


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_each_kind_supplies_depends_on_no_other_prompt_and_no_padding(model, source, name, side):
    ablation, values_of = KINDS[name].prepare(source), partial(source_values, model)
    batch = small_ioi(padding_side=side).batch("test", 0, 5)
    together = ablation.replacements(batch, values_of)
    for row in range(5):
        alone = ablation.replacements(small_ioi().batch("test", row, 1), values_of)
        real = batch.attention_mask[row]
        length = int(real.sum())
        for one, other in zip(together.tensors(), alone.tensors(), strict=True):
            theirs = one.expand(-1, 5, len(real), *one.shape[3:])[:, row, real]
            assert_close(theirs, other.expand(-1, 1, length, *other.shape[3:])[:, 0], rtol=0, atol=1e-12)


def test_only_counterfactual_ablation_lets_the_prompt_through(model, source):
    """Two prompts of one number and length get the same replacements under every total ablation."""
    task = small_ioi(n_tokens=18)
    batches = [task.batch(stream, 0, 4) for stream in ("train", "test")]
    for name, kind in KINDS.items():
        ablation = kind.prepare(AblationSource(model, task))
        one, other = (ablation.replacements(batch, partial(source_values, model)) for batch in batches)
        assert torch.equal(one.heads, other.heads) == kind.total, name
        assert torch.equal(one.inputs, other.inputs) == kind.total, name


def prompts(batches: list[Batch]) -> list[list[int]]:
    return [batch.tokens[row][batch.attention_mask[row]].tolist() for batch in batches for row in range(len(batch))]


def tokens_of(model, rows: list[list[int]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tensors [layer, token, ...] of all tokens but the BOS, prompt by prompt, and their positions."""
    values = [source_values(model, batch_of([row])) for row in rows]
    positions = torch.cat([torch.arange(1, len(row)) for row in rows])
    together = zip(*(one.tensors() for one in values), strict=True)
    return [torch.cat([one[:, 0, 1:] for one in alike], dim=1) for alike in together], positions


def by_hand(model, rows: list[list[int]], n_positions: int, statistic) -> Constants:
    tensors, positions = tokens_of(model, rows)
    where = positions.clamp(max=n_positions - 1)

    def table(values):
        first = [torch.zeros_like(values[:, 0])] if n_positions > 1 else []
        return torch.stack(first + [statistic(values[:, where == row]) for row in where.unique().tolist()], dim=1)

    return Constants(*map(table, tensors))


def mean_of(values: torch.Tensor) -> torch.Tensor:
    return values.mean(dim=1)


def spread_of(values: torch.Tensor) -> torch.Tensor:
    return values.std(dim=1, unbiased=False)


def assert_tables(found: Constants, expected: Constants) -> None:
    assert found.heads.dtype == found.mlps.dtype == torch.float32
    # float32 holds seven digits.
    assert_close(found.heads.double(), expected.heads, rtol=1e-6, atol=1e-7)
    assert_close(found.mlps.double(), expected.mlps, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n_positions", [1, 6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_means_and_spreads_are_those_over_tokens(model, n_positions, side):
    task = small_ioi(n_means=12, padding_side=side, evaluation_batch_size=5)
    source = AblationSource(model, task, n_positions)
    batches = list(task.batches("means", 12))
    assert_tables(source.mean, by_hand(model, prompts(batches), n_positions, mean_of))
    assert_tables(source.spread, by_hand(model, prompts(batches), n_positions, spread_of))
    others = prompts([batch.counterfactual() for batch in batches])
    assert others != prompts(batches)
    assert_tables(source.counterfactual_mean, by_hand(model, others, n_positions, mean_of))
    assert not source.zero.heads.any()
    assert not source.zero.mlps.any()


def test_a_spread_far_smaller_than_the_mean_is_exact():
    model = load_model(LMSpec())
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias += 300.0
    task = small_ioi(n_means=12)
    expected = by_hand(model, prompts(list(task.batches("means", 12))), 1, lambda v: spread_of(v.double()))
    found = AblationSource(model, task).spread
    assert_close(found.mlps.double(), expected.mlps, rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_uneven_batches_one_batch_and_merged_halves_have_the_same_sums(model, side):
    task = small_ioi(padding_side=side)
    bos = task.bos_token_id
    everything = source_means(model, [task.batch("means", 0, 24)], bos)
    parts = [task.batch_of("means", numbers) for numbers in (range(1), range(1, 15), range(15, 24))]
    merged = source_means(model, parts[:2], bos)
    merged.merge(source_means(model, parts[2:], bos))
    halves = [source_means(model, [task.batch("means", number, 12)], bos) for number in range(2)]
    halves[1].merge(halves[0])
    for other in (source_means(model, parts, bos), merged, halves[1]):
        assert torch.equal(other.counts, everything.counts)
        # The values themselves differ in their last bits with the width of a batch.
        assert_close(other.heads, everything.heads, rtol=1e-14, atol=1e-13)
        assert_close(other.mlps, everything.mlps, rtol=1e-14, atol=1e-13)
        for n_positions in (1, 5):
            one, two = other.table(n_positions), everything.table(n_positions)
            assert torch.equal(one.heads, two.heads)
            assert torch.equal(one.mlps, two.mlps)


def test_statistics_are_gathered_once_and_when_needed(model):
    told = []

    def track(batches, description):
        told.append(description)
        return batches

    source = AblationSource(model, small_ioi(n_means=4), track=track)
    assert isinstance(source.statistics(lambda batch: batch, "first"), StreamingMeans)
    for name in ("zero", "resample", "counterfactual"):
        KINDS[name].prepare(source)
    assert told == ["first"]
    for name in KINDS:
        KINDS[name].prepare(source)
    assert told[1:] == [
        "averaging activations",
        "measuring the spread of activations",
        "averaging activations on counterfactuals",
    ]


def test_optimal_is_at_most_mean_and_zero_on_prompts_of_one_length():
    model, task = load_model(LMSpec()), small_ioi(n_tokens=18, n_validation=32)
    source, components = AblationSource(model, task), Components.of(Dimensions.of(model.config))
    masks = torch.stack(
        [components.mask(components.select(kept.split())) for kept in ("* !a0.h0", "* !m2", "a0* a1* m0")]
    )
    others = [source.mean, source.zero]
    settings = RefitSettings(steps=40, batch_size=8, evaluate_every=20)
    fitted = fit_constants(model, task, masks, [source.mean], settings, others=others)
    validation = list(task.batches("validation", 32))
    assert {len(row) for row in prompts(validation)} == {18}
    optimal = circuit_behaviour(model, validation, masks, fitted.sets).kl.mean(dim=1)
    for other in others:
        assert (optimal <= circuit_behaviour(model, validation, masks, [other]).kl.mean(dim=1) + 1e-6).all()
    assert (optimal[2] < 0.8 * circuit_behaviour(model, validation, masks[2:], [source.mean]).kl.mean()).all()
