"""The circuits that the shipped configurations end with, which no change of the code may move."""

import json
from pathlib import Path

import pytest

from oa_train import Circuit
from oa_train.cli.main import main

RECORDED = json.loads((Path(__file__).parent / "training" / "recorded" / "circuits.json").read_text())


def assert_as_recorded(run: Path, name: str) -> None:
    """A finished run has the recorded circuit and, within a thousandth of a nat, its KL divergence."""
    assert list(Circuit.load(run / "circuit").names) == RECORDED[name]["kept"]
    results = json.loads((run / "studies" / "fit_0" / "results.json").read_text())
    assert abs(results["metrics"]["kl"]["mean"] - RECORDED[name]["kl"]) < 1e-3


# The first fifty steps of edges are compared by every `make test` (tests/training/test_recorded_curves.py).
@pytest.mark.long
def test_the_edge_circuit_of_the_built_in_model(tmp_path):
    name = "circuit_edges_tiny"
    words = ["fit", "--config", f"configs/{name}.yaml", "--trainer.default_root_dir", str(tmp_path), "--quiet"]
    assert main(words) == 0
    assert_as_recorded(tmp_path / name / "version_0", name)
