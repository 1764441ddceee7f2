"""The worked example of docs/protocol.md: its commands run one after another, and leave what the page says."""

import json
import re
import shlex
from pathlib import Path

import pytest

from oa_train.cli.main import main
from tests.jobs.fits import ROOT

PAGE = ROOT / "docs" / "protocol.md"
FEW = {
    "fit": ["--trainer.max_steps", "8", "--finish.size", "7", "--finish.refit.steps", "2"],
    "scan": ["--scan.fit.steps", "2", "--scan.fit.batch_size", "4"],
    "curve": ["--curve.fit.steps", "2", "--curve.fit.batch_size", "4"],
    "interact": ["--interact.fit.steps", "1", "--interact.fit.batch_size", "2", "--interact.most_pairs", "6"],
    "sufficient": ["--sufficient.fit.steps", "2", "--sufficient.search_prompts", "8", "--sufficient.pairs", "4"],
    "minimal": ["--minimal.fit.steps", "2"],
    "robustness": ["--robustness.n_subsets", "2", "--robustness.ascent.steps", "2"],
    "compare": ["--compare.fit.steps", "2", "--compare.random_circuits", "2", "--compare.random_fit.steps", "2"],
}
PROMPTS = ["--data.n_test", "16", "--data.n_validation", "16", "--data.n_means", "16"]
FIGURES = {
    "scan": {"maps", "ranked", "gaps"},
    "curve": {"curve"},
    "interact": {"pairs", "ranked"},
    "sufficient": {"recovery"},
    "fit": {"circuit", "keep_probability"},
    "compare": {"comparison"},
    "minimal": {"worth"},
    "robustness": {"subsets"},
}


def commands() -> list[list[str]]:
    """Words of the commands of the worked example."""
    example = PAGE.read_text().partition("## A worked example")[2].partition("\n## ")[0]
    lines = re.findall(r"^    oa-train (.*)$", example, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_worked_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert {words[0] for words in commands()} == FIGURES.keys()
    for command, *words in commands():
        # A run keeps the prompts that it was made with.
        few = [] if "--run" in words else PROMPTS
        assert main([command, *words, *few, *FEW[command], "--quiet"]) == 0
        (results,) = Path("runs").glob(f"*/version_0/studies/{command}_0/results.json")
        assert json.loads(results.read_text())["command"] == command
        assert {file.stem for file in (results.parent / "figures").iterdir()} >= FIGURES[command]
