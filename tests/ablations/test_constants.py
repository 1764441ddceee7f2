"""Constants: which vector stands where, and files that give them back."""

import json
from dataclasses import replace

import pytest
import torch

from oa_train.ablations.constants import Constants, Slots, TrainableConstants
from oa_train.artefacts import HEADER_FILE, Artefact, save_artefact
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from tests.builders import random_batch, random_constants, random_dictionary, tiny_model, with_spans

SPANS = ["m1@s", "m1@t", "a0@s"]


@pytest.fixture(scope="module")
def config():
    return tiny_model("llama").config


@pytest.fixture(scope="module")
def level(config):
    return Nodes.of(config)


def table_row(position: int, n_positions: int) -> int:
    return position if position < n_positions - 1 else n_positions - 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("n_positions", [2, 4, 6, 20])
def test_every_position_gets_its_row_and_later_ones_the_last(level, side, n_positions):
    batch = random_batch([6, 3], side)
    constants = random_constants(level, n_positions)
    values = constants.replacements(batch)
    for site, shape in level.sites.items():
        laid_out = values.at(site).expand(2, -1, -1, -1)
        assert laid_out.shape == (2, 6, *shape)
        for row, length in enumerate((6, 3)):
            first = 6 - length if side == "left" else 0
            for position in range(length):
                expected = constants.tables[site][table_row(position, n_positions)]
                assert torch.equal(laid_out[row, first + position], expected)


def test_pooled_constants_stand_everywhere(level):
    constants = random_constants(level)
    values = constants.replacements(random_batch([6, 3]))
    for site in level.sites:
        assert values.at(site).shape[:2] == (1, 1)
        assert torch.equal(values.at(site)[0, 0], constants.tables[site][0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_span_gets_its_own(config, side):
    level = Nodes.of(config, ["mlp", "heads"], SPANS)
    constants = random_constants(level)
    batch = with_spans(random_batch([6, 5], side), s=(1, 2), t=(3,))
    values = constants.replacements(batch)
    for site in level.sites:
        for number, span in enumerate(level.spans):
            assert torch.equal(values.at(site, span)[0, 0], constants.tables[site][number])
    # With positions told apart, spans have none of their own.
    by_position = random_constants(level, 4)
    for site in level.sites:
        assert len(by_position.tables[site]) == 4
        for span in level.spans:
            assert torch.equal(
                by_position.replacements(batch).at(site, span), by_position.at(batch.positions).at(site)
            )


@pytest.mark.parametrize("n_positions", [1, 4])
def test_gradients_reach_the_rows_that_are_used(level, n_positions):
    constants = random_constants(level, n_positions, requires_grad=True)
    values = constants.replacements(random_batch([3, 3]))
    total = sum(values.at(site).sum() for site in level.sites)
    used = [1.0] if n_positions == 1 else [2.0, 2.0, 2.0, 0.0]
    for gradient in torch.autograd.grad(total, list(constants.tables.values())):
        assert gradient[:, 0, 0].tolist() == used


def test_zeros_are_zero(config, level):
    zeros = Constants.zeros(level, 5)
    assert {site: table.shape[1:] for site, table in zeros.tables.items()} == level.sites
    assert all(len(table) == 5 and not table.any() for table in zeros.tables.values())
    assert zeros.n_positions == 5
    assert Constants.zeros(level).n_positions == 1
    spanned = Nodes.of(config, ["mlp", "heads"], SPANS)
    assert Constants.zeros(spanned).slots == Slots(1, spanned.spans)
    assert all(len(table) == 3 for table in Constants.zeros(spanned).tables.values())


def test_a_table_of_more_positions_repeats_the_last(level):
    constants = random_constants(level, 3)
    wider = constants.with_positions(6)
    for site, table in constants.tables.items():
        assert torch.equal(wider.tables[site], table[[0, 1, 2, 2, 2, 2]])
    assert wider.n_positions == 6
    assert constants.with_positions(3) is constants
    with pytest.raises(ConfigurationError, match="tell 3 positions apart and cannot be put into a table of 2"):
        constants.with_positions(2)


@pytest.mark.parametrize("n_positions", [1, 3])
def test_saved_tables_are_loaded_bit_for_bit(config, tmp_path, n_positions):
    dictionary = random_dictionary("r1")
    level = Nodes.of(config, ["mlp", "heads", "neurons", "features"], SPANS, [dictionary])
    provenance = {"model": "tiny", "task": {"name": "ioi", "seeds": [1, 2]}, "bos_token_id": 0, "revision": None}
    constants = replace(random_constants(level, n_positions, requires_grad=True), provenance=provenance)
    loaded = Constants.load(constants.save(tmp_path / "constants"))
    assert loaded.slots == constants.slots
    assert loaded.provenance == provenance
    assert set(loaded.tables) == set(constants.tables)
    for site, table in loaded.tables.items():
        assert torch.equal(table, constants.tables[site])
        assert table.dtype == torch.float64
        assert not table.requires_grad
    loaded.check_fits(level)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "contradicts itself"),
        ({"heads_0": torch.zeros(2, 4, 12)}, "not of 1 slots"),
        ({"heads_0": torch.zeros(1, 4)}, "does not hold constants|not of 1 slots"),
        ({"heads": torch.zeros(1, 4, 12)}, "'heads' names no site"),
        ({"hats_0": torch.zeros(1, 4, 12)}, "'hats_0' names no site"),
    ],
)
def test_a_folder_with_other_tables_is_refused(tmp_path, tensors, message):
    header = {"positions": 1, "spans": [None], "provenance": {}}
    folder = save_artefact(tmp_path / "c", "constants", Artefact(header, tensors))
    with pytest.raises(ArtefactError, match=message):
        Constants.load(folder)


@pytest.mark.parametrize("header", [{"provenance": {}}, {"positions": 1, "spans": [None]}, [1, 2], None])
def test_a_folder_with_another_header_is_refused(level, tmp_path, header):
    folder = Constants.zeros(level).save(tmp_path / "c")
    document = json.loads((folder / HEADER_FILE).read_text())
    (folder / HEADER_FILE).write_text(json.dumps(document | {"header": header}))
    with pytest.raises(ArtefactError, match=str(folder)):
        Constants.load(folder)


def test_a_circuit_is_not_constants(tmp_path):
    folder = save_artefact(tmp_path / "c", "circuit", Artefact({}, {}))
    with pytest.raises(ArtefactError, match="holds 'circuit'; expected 'constants'"):
        Constants.load(folder)


def test_constants_that_do_not_fit_a_level_are_refused(config, level):
    constants = random_constants(level)
    constants.check_fits(level)
    lacking = replace(constants, tables={s: t for s, t in constants.tables.items() if s != Site("mlp", 1)})
    with pytest.raises(ArtefactError, match="lack the site mlp_1; they have heads_0, mlp_0, heads_1"):
        lacking.check_fits(level)
    wrong = replace(constants, tables=constants.tables | {Site("heads", 2): torch.zeros(1, 4, 13)})
    message = "heads_2 are for 4 units of width 13; this model has 4 units of width 12 there"
    with pytest.raises(ArtefactError, match=message):
        wrong.check_fits(level)
    with pytest.raises(ArtefactError, match="were not made for the spans s, t of the circuit"):
        constants.check_fits(Nodes.of(config, ["heads", "mlp"], ["m1@s", "m1@t"]))
    # Constants may be of more than the circuit needs.
    constants.check_fits(Nodes.of(config, ["mlp"]))


def test_a_detached_copy_is_not_changed_by_training(level):
    constants = random_constants(level, requires_grad=True)
    copy = constants.detach()
    before = {site: table.clone() for site, table in copy.tables.items()}
    with torch.no_grad():
        for table in constants.tables.values():
            table.add_(1)
    for site, table in copy.tables.items():
        assert torch.equal(table, before[site])
        assert not table.requires_grad
    assert copy.slots == constants.slots


def test_trainable_constants_start_where_they_are_told_and_share_gradients(level):
    starts = [random_constants(level, 2, seed) for seed in (0, 1)]
    trainable = TrainableConstants(starts)
    sets = trainable.sets()
    for start, constants in zip(starts, sets, strict=True):
        assert constants.slots == start.slots
        assert all(torch.equal(table, start.tables[site].float()) for site, table in constants.tables.items())
    heads, mlp = Site("heads", 1), Site("mlp", 2)
    (sets[1].tables[heads].sum() + 3 * sets[0].tables[mlp].sum()).backward()
    tables = trainable.by_site()
    assert tables[heads].grad.amax(dim=(1, 2, 3)).tolist() == [0, 1]
    assert tables[mlp].grad.amin(dim=(1, 2, 3)).tolist() == [3, 0]
    assert tables[Site("mlp", 0)].grad is None
    other = random_constants(level, 2, 5)
    trainable.load(other)
    for constants in trainable.sets():
        assert all(torch.equal(table, other.tables[site].float()) for site, table in constants.tables.items())


def test_only_sites_that_are_named_are_trained(level):
    trainable = TrainableConstants([random_constants(level)], [Site("mlp", 1)])
    assert [key for key, table in trainable.tables.items() if table.requires_grad] == ["mlp_1"]
