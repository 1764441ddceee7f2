"""Every kind of ablation on the built-in model; means and spreads against plain ones over tokens."""

import pickle
from collections import defaultdict
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from oa_train.ablations.base import Ablation
from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour, circuit_logits
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.means import StreamingMeans
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource, check_kind
from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.engine.reading import read_values
from oa_train.engine.values import Values
from oa_train.errors import ConfigurationError
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec
from oa_train.progress import Track
from tests.builders import batch_of, random_dictionary, small_ioi
from tests.engine.selections import EVERY_KIND

NAMES = (
    "optimal",
    "mean",
    "mean_by_position",
    "zero",
    "resample",
    "noise",
    "counterfactual_mean",
    "counterfactual",
    "clean",
)
LEARNED, CONSTANT = "optimal", {"optimal", "mean", "zero", "counterfactual_mean"}
NOT_TOTAL, PAIRED = {"counterfactual", "clean"}, {"counterfactual_mean", "counterfactual"}
PATTERNS = ["m*@S2", "r2@end", "a*.h*@-1", "f1.3@S2", "m0.n1?@IO", "tokens@S1"]


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec(dtype="float64"))


@pytest.fixture(scope="module")
def plain(model):
    return Nodes.of(model.config, ["embedding", "heads", "mlp"])


def dictionaries(model):
    return [random_dictionary(site, d_model=model.config.hidden_size) for site in ("r1", "m2")]


@pytest.fixture(scope="module")
def spanned(model):
    """Units of every kind, of which heads, MLPs and some others are restricted to spans."""
    return Nodes.of(model.config, EVERY_KIND, PATTERNS, dictionaries(model))


@pytest.fixture(scope="module")
def sources(model, plain, spanned):
    return {"plain": AblationSource(model, small_ioi(), plain), "spanned": AblationSource(model, small_ioi(), spanned)}


def at_tokens(values: Values, level: Nodes, batch: Batch) -> list[torch.Tensor]:
    """What the real tokens of each prompt get at every site and span, prompt by prompt."""
    n_rows, width = batch.tokens.shape
    return [
        values.at(site, span).expand(n_rows, width, -1, -1)[row, inside[row]]
        for span in level.spans
        for inside in [batch.attention_mask if span is None else batch.layout.span(span)]
        for site in level.sites
        for row in range(n_rows)
    ]


def test_each_kind_says_what_it_is():
    assert tuple(ABLATION_KINDS) == NAMES
    for name, kind in ABLATION_KINDS.items():
        assert kind.name == name
        assert kind.learned == (name == LEARNED)
        assert kind.constant == (name in CONSTANT)
        assert kind.total == (name not in NOT_TOTAL)
        assert kind.paired == (name in PAIRED)
        assert kind.restores == (name == "clean")


def test_a_kind_that_takes_something_away_is_looked_up_by_name():
    for name, kind in ABLATION_KINDS.items():
        if name != "clean":
            assert check_kind("ablation", name) is kind
    with pytest.raises(ConfigurationError, match=r"ablation is 'resampel'; expected one of .*Did you mean .*resample"):
        check_kind("ablation", "resampel")
    with pytest.raises(ConfigurationError, match=r"ablation is 'clean', which restores the model's own values"):
        check_kind("ablation", "clean")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("units", ["plain", "spanned"])
def test_with_everything_kept_each_kind_gives_the_models_own_logits(model, sources, units, name):
    level, batch = sources[units].level, small_ioi(padding_side="left").batch("test", 0, 5)
    ablation, clean = ABLATION_KINDS[name].prepare(sources[units]), scored_logits(model, batch)
    kept = torch.ones(1, len(level)).bool()
    assert torch.equal(circuit_logits(model, batch, level, kept, [ablation]), clean)
    ablated = circuit_logits(model, batch, level, ~kept, [ablation])
    if name == "clean":
        assert_close(ablated, clean, rtol=0, atol=1e-10)
    else:
        assert (ablated - clean).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_each_kind_of_ablation_runs_on_each_kind_of_site(model, kind, name):
    level = Nodes.of(model.config, [kind], (), dictionaries(model) if kind == "features" else ())
    task = small_ioi(n_means=8)
    ablation = ABLATION_KINDS[name].prepare(AblationSource(model, task, level))
    batch, nothing = task.batch("test", 0, 3), torch.zeros(1, len(level)).bool()
    clean, ablated = scored_logits(model, batch), circuit_logits(model, batch, level, nothing, [ablation])
    if name == "clean":
        assert_close(ablated, clean, rtol=0, atol=1e-10)
    else:
        assert (ablated - clean).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_positions", [1, 4])
def test_each_kind_is_prepared_with_what_it_needs(model, plain, name, n_positions):
    ablation = ABLATION_KINDS[name].prepare(AblationSource(model, small_ioi(n_means=4), plain, n_positions))
    assert isinstance(ablation, Constants) == (ABLATION_KINDS[name].constant or name == "mean_by_position")
    if ABLATION_KINDS[name].constant:
        assert ablation.n_positions == n_positions
        ablation.check_fits(plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("units", ["plain", "spanned"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_each_kind_supplies_depends_on_no_other_prompt_and_no_padding(model, sources, units, name, side):
    level, ablation = sources[units].level, ABLATION_KINDS[name].prepare(sources[units])
    values_of = partial(read_values, model, level=level)
    batch = small_ioi(padding_side=side).batch("test", 0, 4)
    together = at_tokens(ablation.replacements(batch, values_of), level, batch)
    rows = [small_ioi().batch("test", row, 1) for row in range(4)]
    alone = [at_tokens(ablation.replacements(row, values_of), level, row) for row in rows]
    expected = [values for of_rows in zip(*alone, strict=True) for values in of_rows]
    for values, other in zip(together, expected, strict=True):
        assert_close(values, other, rtol=0, atol=1e-10)


def test_only_ablations_that_are_not_total_let_the_prompt_through(model, plain):
    """Two prompts of one number and length get the same replacements under every total ablation."""
    task = small_ioi(n_tokens=18)
    batches = [task.batch(stream, 0, 4) for stream in ("train", "test")]
    for name, kind in ABLATION_KINDS.items():
        ablation: Ablation = kind.prepare(AblationSource(model, task, plain))
        first, second = (ablation.replacements(batch, partial(read_values, model, level=plain)) for batch in batches)
        same = all(torch.equal(first[site], second[site]) for site in plain.sites)
        assert same == kind.total, name


def prompts(batches: list[Batch]) -> list[list[int]]:
    return [batch.tokens[row][batch.attention_mask[row]].tolist() for batch in batches for row in range(len(batch))]


def tokens_of(model, level: Nodes, rows: list[list[int]]) -> tuple[dict[Site, torch.Tensor], torch.Tensor]:
    """Values [token, unit, width] of all tokens but the BOS, prompt by prompt, and their positions."""
    values = [read_values(model, batch_of([row]), level) for row in rows]
    positions = torch.cat([torch.arange(1, len(row)) for row in rows])
    return {site: torch.cat([of_row[site][0, 1:] for of_row in values]) for site in level.sites}, positions


def assert_statistic(constants: Constants, model, level: Nodes, rows: list[list[int]], statistic) -> None:
    values, positions = tokens_of(model, level, rows)
    n_positions = constants.n_positions
    slots = positions.clamp(max=n_positions - 1)
    for site, table in constants.tables.items():
        assert table.dtype == torch.float32
        for slot in range(min(1, n_positions - 1), n_positions):
            # float32 holds seven digits.
            assert_close(table[slot].double(), statistic(values[site][slots == slot]), rtol=1e-6, atol=1e-7)
        assert n_positions == 1 or not table[0].any()


def mean_of(values: torch.Tensor) -> torch.Tensor:
    return values.mean(dim=0)


def spread_of(values: torch.Tensor) -> torch.Tensor:
    return values.double().std(dim=0, unbiased=False)


@pytest.mark.parametrize("n_positions", [1, 6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_means_and_spreads_are_those_over_tokens(model, plain, n_positions, side):
    task = small_ioi(n_means=12, padding_side=side, evaluation_batch_size=5)
    source = AblationSource(model, task, plain, n_positions)
    batches = list(task.batches("means", 12))
    assert_statistic(source.mean, model, plain, prompts(batches), mean_of)
    assert_statistic(source.spread, model, plain, prompts(batches), spread_of)
    by_position = source.mean_by_position
    assert by_position.n_positions == (n_positions if n_positions > 1 else max(int(b.lengths.max()) for b in batches))
    assert_statistic(by_position, model, plain, prompts(batches), mean_of)
    others = prompts([batch.counterfactual() for batch in batches])
    assert others != prompts(batches)
    assert_statistic(source.counterfactual_mean, model, plain, others, mean_of)
    assert not any(table.any() for table in source.zero.tables.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_means_and_spreads_at_a_span_are_plain_ones_over_prompts(model, spanned, side):
    task = small_ioi(n_means=12, padding_side=side, evaluation_batch_size=5)
    source = AblationSource(model, task, spanned)
    own, paired = defaultdict(list), defaultdict(list)
    for batch in task.batches("means", 12):
        values, counterfactual = (read_values(model, each, spanned) for each in (batch, batch.counterfactual()))
        for span in spanned.spans:
            inside = batch.attention_mask & ~batch.protected if span is None else batch.layout.span(span)
            for site in spanned.sites:
                own[span, site].append(values[site][inside])
                paired[span, site].append(counterfactual[site][inside])
    for (span, site), tokens in own.items():
        slot, others = spanned.spans.index(span), torch.cat(paired[span, site])
        together = torch.cat(tokens)
        assert_close(source.mean.tables[site][slot].double(), mean_of(together), rtol=1e-6, atol=1e-6)
        assert_close(source.spread.tables[site][slot].double(), spread_of(together), rtol=1e-5, atol=1e-5)
        assert_close(source.counterfactual_mean.tables[site][slot].double(), mean_of(others), rtol=1e-6, atol=1e-6)


def test_a_spread_far_smaller_than_the_mean_is_exact():
    model = load_model(LMSpec())
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias += 300.0
    task, level, site = small_ioi(n_means=12), Nodes.of(model.config, ["mlp"]), Site("mlp", 1)
    values, _ = tokens_of(model, level, prompts(list(task.batches("means", 12))))
    spread = AblationSource(model, task, level).spread.tables[site][0]
    assert_close(spread.double(), spread_of(values[site]), rtol=1e-5, atol=0)


def test_statistics_are_gathered_once_and_when_needed(model, plain):
    shown = []

    class Told(Track):
        @contextmanager
        def __call__(self, passes, description):
            shown.append(description)
            yield lambda done: None

    source = AblationSource(model, small_ioi(n_means=4), plain, track=Told())
    assert isinstance(source.sums(lambda batch: batch, "first"), StreamingMeans)
    for name in ("zero", "resample", "counterfactual", "clean"):
        ABLATION_KINDS[name].prepare(source)
    assert shown == ["first"]
    for name in ABLATION_KINDS:
        ABLATION_KINDS[name].prepare(source)
    assert shown[1:] == [
        "averaging activations",
        "averaging activations by position",
        "measuring the spread of activations",
        "averaging activations on counterfactuals",
    ]


def test_optimal_is_at_most_mean_and_zero_on_prompts_of_one_length():
    model, task = load_model(LMSpec()), small_ioi(n_tokens=18, n_validation=32)
    level = Nodes.of(model.config)
    source = AblationSource(model, task, level)
    masks = torch.stack([level.selected(kept.split()) for kept in ("* !a0.h0", "* !m2", "a0* a1* m0")])
    others = [source.mean, source.zero]
    settings = RefitSettings(steps=40, batch_size=8, evaluate_every=20)
    fitted = fit_constants(model, task, level, masks, [source.mean], settings, others=others)
    validation = list(task.batches("validation", 32))
    assert {len(row) for row in prompts(validation)} == {18}
    optimal = circuit_behaviour(model, validation, level, masks, fitted.sets).kl.mean(dim=1)
    mean, zero = (circuit_behaviour(model, validation, level, masks, [other]).kl.mean(dim=1) for other in others)
    assert (optimal <= torch.minimum(mean, zero) + 1e-6).all()
    assert (optimal[2] < 0.8 * mean[2]).all()


@pytest.mark.parametrize("kind", ABLATION_KINDS.values(), ids=list(ABLATION_KINDS))
def test_a_kind_reaches_another_process_by_its_name(kind):
    assert pickle.loads(pickle.dumps(kind)) is kind
