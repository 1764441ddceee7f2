"""Pieces of a batch and of its circuits: each pair once, within rows and memory."""

import pytest
import torch

from oa_train.engine import chunks as chunks_module
from oa_train.engine.chunks import chunks
from oa_train.engine.levels import ENGINES
from oa_train.models.graph import Graph
from oa_train.models.selection import Nodes
from tests.builders import random_batch, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def masks_of(n_circuits: int, level) -> torch.Tensor:
    """Circuits that ablate everything, so that they share no layer."""
    return torch.zeros(n_circuits, len(level), dtype=torch.bool)


def pairs(pieces, n_circuits: int) -> list[tuple[int, int]]:
    """Number of the prompt and of the circuit, of every row of every run."""
    return [
        (prompt, circuit)
        for piece, slices in pieces
        for circuits in slices
        for circuit in range(n_circuits)[circuits]
        for prompt in piece.example_ids.tolist()
    ]


def everything(n_prompts: int, n_circuits: int) -> list[tuple[int, int]]:
    return [(prompt, circuit) for prompt in range(n_prompts) for circuit in range(n_circuits)]


@pytest.mark.parametrize("rows_per_run", [1, 5, 7, 10, 14, 1000])
@pytest.mark.parametrize("n_circuits", [1, 2, 7])
def test_runs_of_nodes_cover_every_circuit_and_prompt_once_within_the_rows(model, rows_per_run, n_circuits):
    batch = random_batch([4, 6, 3, 5, 4])
    nodes = Nodes.of(model.config)
    pieces = list(chunks(model, nodes, batch, masks_of(n_circuits, nodes), rows_per_run))
    assert sorted(pairs(pieces, n_circuits)) == everything(5, n_circuits)
    for piece, slices in pieces:
        assert all(len(piece) * (circuits.stop - circuits.start) <= rows_per_run for circuits in slices)
    # All circuits run together on as many prompts as the rows allow; only for more circuits than rows are they cut.
    together = max(1, rows_per_run // n_circuits)
    assert [len(piece) for piece, _ in pieces[:-1]] == [together] * (len(pieces) - 1)
    assert all(len(slices) == max(1, -(-n_circuits // rows_per_run)) for _, slices in pieces)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 12, 100])
def test_runs_of_edges_stay_within_memory(model, monkeypatch, rows, gradients):
    graph, batch = Graph.of(model.config), random_batch([4, 6, 3, 5, 4])
    masks = masks_of(4, graph)
    row_bytes = ENGINES[Graph].row_bytes(model, batch, graph, masks, gradients)[0]
    assert row_bytes > 0
    monkeypatch.setattr(chunks_module, "RUN_BYTES", rows * row_bytes + row_bytes // 2)
    pieces = list(chunks(model, graph, batch, masks, rows_per_run=10, gradients=gradients))
    assert sorted(pairs(pieces, 4)) == everything(5, 4)
    for piece, slices in pieces:
        for circuits in slices:
            assert len(piece) * (circuits.stop - circuits.start) <= min(rows, 10)


def test_a_backward_pass_takes_more_memory_than_none(model):
    graph, batch = Graph.of(model.config), random_batch([4, 6, 3, 5, 4])
    masks = masks_of(1, graph)
    without, with_gradients = (ENGINES[Graph].row_bytes(model, batch, graph, masks, kept) for kept in (False, True))
    assert without < with_gradients


def test_runs_of_nodes_stay_within_memory(model, monkeypatch):
    nodes, batch = Nodes.of(model.config), random_batch([4, 6, 3, 5, 4])
    masks = masks_of(4, nodes)
    row_bytes = ENGINES[Nodes].row_bytes(model, batch, nodes, masks, True)[0]
    monkeypatch.setattr(chunks_module, "RUN_BYTES", 3 * row_bytes)
    pieces = list(chunks(model, nodes, batch, masks, gradients=True))
    assert sorted(pairs(pieces, 4)) == everything(5, 4)
    assert max(len(piece) * (s.stop - s.start) for piece, slices in pieces for s in slices) == 3


def test_more_circuits_fit_into_a_run_where_they_share_layers(model, monkeypatch):
    nodes, batch = Nodes.of(model.config), random_batch([4, 6, 3, 5, 4])
    first, last = (~nodes.mask([name]) for name in ("m0", f"m{nodes.dimensions.n_layers - 1}"))
    early, late = first.expand(8, -1), last.expand(8, -1)
    monkeypatch.setattr(
        chunks_module, "RUN_BYTES", 3 * ENGINES[Nodes].row_bytes(model, batch, nodes, masks_of(1, nodes), True)[0]
    )
    runs = []
    for masks in (early, late):
        pieces = list(chunks(model, nodes, batch, masks, gradients=True))
        assert sorted(pairs(pieces, 8)) == everything(5, 8)
        runs.append(sum(len(slices) for _, slices in pieces))
    assert runs[0] > runs[1]
    # Without a backward pass only one block's activations exist at a time, and all circuits are in the last one.
    without = [
        sum(len(slices) for _, slices in chunks(model, nodes, batch, masks, rows_per_run=8)) for masks in (early, late)
    ]
    assert without == [5, 5]


def test_a_row_that_is_too_large_runs_alone(model, monkeypatch):
    monkeypatch.setattr(chunks_module, "RUN_BYTES", 1)
    graph, batch = Graph.of(model.config), random_batch([4, 6, 3])
    pieces = list(chunks(model, graph, batch, masks_of(2, graph)))
    assert [len(piece) for piece, _ in pieces] == [1, 1, 1]
    assert sorted(pairs(pieces, 2)) == everything(3, 2)
    assert torch.equal(torch.cat([piece.tokens for piece, _ in pieces]), batch.tokens)
