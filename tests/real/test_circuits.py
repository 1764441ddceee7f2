"""Circuits of a pretrained model, from the command line to their tables."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import AblationSource
from oa_train.cli.main import main
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.levels import Level
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from oa_train.tasks import IOI

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent.parent
FEW = ["--data.n_validation", "4", "--data.n_test", "8", "--data.n_means", "16", "--data.batch_size", "2"]


def results(run: Path, study: str) -> Any:
    return json.loads((run / "studies" / study / "results.json").read_text())


@pytest.mark.parametrize("level", [Nodes, Graph])
def test_keeping_everything_is_the_model_and_learned_constants_beat_means_and_zeros(
    real: CausalLM, real_lm: LMSpec, level: type[Any]
) -> None:
    task = IOI(lm=real_lm, sentences="literature", n_tokens=20, n_means=16, n_validation=8)
    whole: Level = level.of(real.config)
    batches = list(task.batches("test", 4))
    source = AblationSource(real, task, whole)
    everything = torch.ones(1, len(whole), dtype=torch.bool)
    assert circuit_behaviour(real, batches, whole, everything, [source.zero]).kl.max() < 1e-4
    # Everything in the last ten layers that does not write to the logits of the last token is left alone.
    without = whole.mask([name for name in whole.names if not re.match(r"(a|m)1\d", name)]).unsqueeze(0)
    settings = RefitSettings(steps=8, batch_size=4, evaluate_every=2)
    fitted = fit_constants(real, task, whole, without, [source.mean], settings, others=[source.mean, source.zero])
    validation = list(task.batches("validation", 8))
    kl = {
        kind: circuit_behaviour(real, validation, whole, without, [ablation]).kl.mean().item()
        for kind, ablation in (("optimal", fitted.sets[0]), ("mean", source.mean), ("zero", source.zero))
    }
    # The constants are chosen on these prompts; a few steps are enough to be better there.
    assert kl["optimal"] == pytest.approx(fitted.validation_loss.item(), rel=1e-4)
    assert kl["optimal"] < kl["mean"] < kl["zero"]


@pytest.mark.parametrize(("config", "size"), [("circuit_nodes_smollm2", "150"), ("circuit_edges_smollm2", "20000")])
def test_a_circuit_from_fit_to_compare(
    real_lm: LMSpec, in_folder: Path, capsys: pytest.CaptureFixture[str], config: str, size: str
) -> None:
    command = ["fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), "--lm.name", real_lm.name, *FEW]
    command += ["--experiment", "short", "--model.target_size", size, "--model.target_warmup", "2"]
    command += ["--trainer.max_steps", "5", "--trainer.limit_val_batches", "1", "--data.batches_per_epoch", "5"]
    command += ["--finish.size", size, "--finish.refit.steps", "4", "--finish.refit.batch_size", "4"]
    assert main(command) == 0
    run = in_folder / "runs" / "short" / "version_0"
    metrics = results(run, "fit_0")["metrics"]
    assert 0 < metrics["kl"]["mean"] < 20
    assert (
        main(["compare", "--run", str(run), "--compare.random_circuits", "2", "--compare.random_fit.steps", "2"]) == 0
    )
    kl = {row["ablation"]: row["kl"]["mean"] for row in results(run, "compare_0")["rows"]}
    assert kl["optimal"] < kl["zero"]
    assert len(kl) == 8
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) < 400
    assert (run / "studies" / "compare_0" / "figures" / "comparison.png").stat().st_size > 10_000


def test_own_prompts_from_a_file_to_a_circuit(
    real_lm: LMSpec, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs = [("walk", "walked"), ("play", "played"), ("talk", "talked"), ("open", "opened"), ("close", "closed")]
    people = [
        "she",
        "he",
        "they",
        "we",
        "you",
        "people",
        "children",
        "farmers",
        "doctors",
        "students",
        "guests",
        "boys",
    ]
    rows = [
        {"prompt": f"Every day {who} {now}. Yesterday {who} also", "answer": f" {then}", "wrong_answer": f" {now}"}
        for who in people
        for now, then in verbs
    ]
    Path("prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = ["--data", "Records", "--data.path", "prompts.jsonl"]
    assert main(["check-data", "--lm.name", real_lm.name, *data]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    command = ["fit", "--model", "CircuitModule", "--lm.name", real_lm.name, *data, "--data.batch_size", "2"]
    command += ["--data.batches_per_epoch", "3", "--trainer.max_epochs", "1", "--model.samples_per_prompt", "2"]
    command += ["--finish.size", "100", "--finish.refit.steps", "2", "--finish.refit.batch_size", "4"]
    assert main(command) == 0
    run = in_folder / "runs" / "circuit" / "version_0"
    written = results(run, "fit_0")
    assert written["task"]["n_prompts"] == 12
    assert written["metrics"]["kl"]["n"] == 12
    assert main(["compare", "--run", str(run), "--compare.random_circuits", "0"]) == 0
