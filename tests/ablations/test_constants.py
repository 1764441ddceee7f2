"""Constants: which vector stands where, and files that give them back."""

import json

import pytest
import torch

from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.artefacts import HEADER_FILE, Artefact, save_artefact
from oa_train.errors import ArtefactError
from oa_train.models.families import Dimensions
from tests.builders import BOS, random_batch, random_constants, tiny_model

SIZES = Dimensions(n_layers=3, n_heads=4, d_head=12, d_model=32)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def table_row(position: int, n_positions: int) -> int:
    return position if position < n_positions - 1 else n_positions - 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("n_positions", [2, 4, 6, 20])
def test_every_position_gets_its_row_and_later_ones_the_last(model, side, n_positions):
    batch = random_batch([6, 3], side)
    constants = random_constants(model, n_positions)
    laid = constants.replacements(batch)
    assert laid.heads.shape == (3, 2, 6, 4, 12)
    assert laid.mlps.shape == (3, 2, 6, 32)
    for row, length in enumerate((6, 3)):
        first = 6 - length if side == "left" else 0
        for position in range(length):
            number = table_row(position, n_positions)
            assert torch.equal(laid.heads[:, row, first + position], constants.heads[:, number])
            assert torch.equal(laid.mlps[:, row, first + position], constants.mlps[:, number])


def test_pooled_constants_stand_everywhere(model):
    constants = random_constants(model)
    laid = constants.replacements(random_batch([6, 3]))
    assert torch.equal(laid.heads.expand(-1, 2, 6, -1, -1)[:, 1, 4], constants.heads[:, 0])
    assert torch.equal(laid.mlps.expand(-1, 2, 6, -1)[:, 1, 4], constants.mlps[:, 0])


@pytest.mark.parametrize("n_positions", [1, 4])
def test_gradients_reach_the_rows_that_are_used(model, n_positions):
    constants = random_constants(model, n_positions, requires_grad=True)
    laid = constants.replacements(random_batch([3, 3]))
    heads, mlps = torch.autograd.grad(laid.heads.sum() + laid.mlps.sum(), (constants.heads, constants.mlps))
    used = [1.0] if n_positions == 1 else [2.0, 2.0, 2.0, 0.0]
    assert heads[0, :, 0, 0].tolist() == used
    assert mlps[0, :, 0].tolist() == used


def test_zeros_are_zero():
    zeros = Constants.zeros(SIZES, BOS, 5)
    assert zeros.heads.shape == (3, 5, 4, 12)
    assert zeros.mlps.shape == (3, 5, 32)
    assert not zeros.heads.any()
    assert not zeros.mlps.any()
    assert zeros.bos_token_id == BOS
    assert zeros.n_positions == 5
    assert Constants.zeros(SIZES).n_positions == 1
    assert Constants.zeros(SIZES).bos_token_id is None


@pytest.mark.parametrize("bos", [0, 7, None])
def test_a_saved_table_is_loaded_bit_for_bit(model, tmp_path, bos):
    drawn = random_constants(model, 3, requires_grad=True)
    provenance = {"model": "tiny", "task": {"name": "ioi", "seeds": [1, 2]}, "revision": None}
    constants = Constants(*drawn.tensors(), bos, provenance)
    loaded = Constants.load(constants.save(tmp_path / "constants"))
    assert all(map(torch.equal, loaded.tensors(), constants.tensors()))
    assert loaded.heads.dtype == torch.float64
    assert loaded.bos_token_id == bos
    assert loaded.provenance == provenance
    assert not loaded.heads.requires_grad


@pytest.mark.parametrize("lacking", ["inputs", "heads", "mlps"])
def test_a_folder_without_a_table_is_refused(tmp_path, lacking):
    tensors = {"inputs": torch.zeros(1, 1, 32), "heads": torch.zeros(3, 1, 4, 12), "mlps": torch.zeros(3, 1, 32)}
    del tensors[lacking]
    folder = save_artefact(tmp_path / "c", "constants", Artefact({"bos_token_id": 1, "provenance": {}}, tensors))
    with pytest.raises(ArtefactError, match=f"{folder} does not hold constants.*{lacking}"):
        Constants.load(folder)


@pytest.mark.parametrize("header", [{"provenance": {}}, {"bos_token_id": 1}, [1, 2], None])
def test_a_folder_with_another_header_is_refused(tmp_path, header):
    folder = Constants.zeros(SIZES).save(tmp_path / "c")
    document = json.loads((folder / HEADER_FILE).read_text())
    (folder / HEADER_FILE).write_text(json.dumps(document | {"header": header}))
    with pytest.raises(ArtefactError, match=str(folder)):
        Constants.load(folder)


def test_a_circuit_is_not_constants(tmp_path):
    folder = save_artefact(tmp_path / "c", "circuit", Artefact({}, {}))
    with pytest.raises(ArtefactError, match="holds 'circuit'; expected 'constants'"):
        Constants.load(folder)


def test_a_detached_copy_is_not_changed_by_training(model):
    constants = random_constants(model, requires_grad=True)
    copy = constants.detach()
    before = copy.heads.clone()
    with torch.no_grad():
        constants.heads.add_(1)
    assert torch.equal(copy.heads, before)
    assert not copy.heads.requires_grad
    assert copy.bos_token_id == constants.bos_token_id


def test_trainable_constants_start_where_they_are_told_and_share_gradients(model):
    starts = [random_constants(model, 2, seed) for seed in (0, 1)]
    trainable = TrainableConstants(starts)
    sets = trainable.sets()
    for start, one in zip(starts, sets, strict=True):
        assert torch.equal(one.heads, start.heads.float())
        assert torch.equal(one.mlps, start.mlps.float())
        assert one.bos_token_id == BOS
    (sets[1].heads.sum() + 3 * sets[0].mlps.sum()).backward()
    assert trainable.heads.grad.amax(dim=(1, 2, 3, 4)).tolist() == [0, 1]
    assert trainable.mlps.grad.amin(dim=(1, 2, 3)).tolist() == [3, 0]
    other = random_constants(model, 2, 5)
    trainable.load(other)
    for one in trainable.sets():
        assert torch.equal(one.heads, other.heads.float())
        assert torch.equal(one.mlps, other.mlps.float())
