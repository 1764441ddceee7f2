"""What a newcomer meets: tasks of their own that fail, runs that are finished, lists of runs, long texts."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from oa_train.cli.main import main
from oa_train.cli.runs import runs
from oa_train.studies.run_folder import RunFolder
from oa_train.training.checkpoints import read_checkpoint
from tests.jobs.fits import ROOT

BRIEF = [
    *("--data.n_test", "8", "--data.n_validation", "8", "--data.n_means", "8", "--data.batch_size", "4"),
    *("--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false", "--finish.refit.steps", "0"),
    *("--trainer.accelerator", "cpu", "--data.batches_per_epoch", "1"),
]
FIT = ["fit", "--model", "CircuitModule", "--data", "IOI", *BRIEF]
FIRST = Path("runs/circuit/version_0")

TASKS = """
from pathlib import Path
from oa_train.tasks.induction import Induction

class Reads(Induction):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        Path("prompts.txt").read_text()

class Misses(Induction):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        {}["answer"]

class Refuses(Induction):
    def __init__(self, k: int = 3, **options) -> None:
        super().__init__(**options)
        raise ValueError(f"k is {k}; there are two")

class Asks(Induction):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.nothing

class Draws(Induction):
    def draw(self, random):
        raise ZeroDivisionError("no words left")

class Wordy(Induction):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        raise ValueError(f"the prompt {'x' * 100_000!r} has no answer")
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"tasks_{tmp_path.name}.py").write_text(TASKS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Root of one finished run."""
    root = tmp_path_factory.mktemp("root")
    assert main([*FIT, "--trainer.default_root_dir", str(root)]) == 0
    return root


def said(capsys: pytest.CaptureFixture, *words: str, status: int) -> str:
    assert main(list(words)) == status
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return shown.out + shown.err


@pytest.mark.parametrize(
    ("name", "status", "problem", "function", "line"),
    [
        ("Reads", 2, "FileNotFoundError: [Errno 2] No such file or directory: 'prompts.txt'", "__init__", 8),
        ("Misses", 2, "KeyError: 'answer'", "__init__", 13),
        ("Refuses", 2, "ValueError: k is 3; there are two", "__init__", 18),
        ("Asks", 2, "AttributeError: 'Asks' object has no attribute 'nothing'", "__init__", 23),
        ("Draws", 1, "ZeroDivisionError: no words left", "draw", 27),
    ],
)
def test_an_error_in_a_users_task_names_their_file_line_and_exception(
    tmp_path, capsys, name, status, problem, function, line
):
    words = ["fit", "--model", "CircuitModule", "--data", f"tasks_{tmp_path.name}.{name}", *BRIEF]
    message = said(capsys, *words, status=status)
    place = f"It was raised in {function} ({tmp_path}/tasks_{tmp_path.name}.py, line {line})"
    assert f"oa-train: error: {problem}\n{place}" in message
    assert "Union" not in message
    assert "deletes" not in message


def test_a_module_that_cannot_be_imported_names_its_line(tmp_path, capsys):
    Path("broken_mine.py").write_text("import os\nopen('words.txt')\n")
    message = said(capsys, "fit", "--model", "CircuitModule", "--data", "broken_mine.Task", status=2)
    assert "data is 'broken_mine.Task', which cannot be imported: FileNotFoundError: [Errno 2]" in message
    assert f"(raised in <module> ({tmp_path}/broken_mine.py, line 2))" in message


def test_a_long_text_is_cut(tmp_path, capsys):
    words = ["fit", "--model", "CircuitModule", "--data", f"tasks_{tmp_path.name}.Wordy", *BRIEF]
    message = said(capsys, *words, status=2)
    assert len(message) < 1500
    assert "ValueError: the prompt 'xxx" in message
    assert "characters] ... xxx" in message
    assert "xxx' has no answer\nIt was raised in __init__" in message
    message = said(capsys, *FIT, "--model.ablation", "y" * 100_000, status=2)
    assert len(message) < 1500


def test_a_refused_run_leaves_no_folder_but_those_that_were_there(capsys):
    assert "invalid accelerator" in said(capsys, *FIT, "--trainer.accelerator", "gpuu", status=2)
    assert not Path("runs").exists()
    Path("runs").mkdir()
    said(capsys, *FIT, "--trainer.accelerator", "gpuu", "--experiment", "sweep/low", status=2)
    assert list(Path("runs").iterdir()) == []


def test_the_help_of_ckpt_path_names_what_is_accepted(capsys):
    text = " ".join(said(capsys, "fit", "--help", status=0).split("--ckpt_path CKPT_PATH")[-1].split())
    assert text.startswith("checkpoint file to resume or evaluate, such as runs/<experiment>/version_<N>/checkpoints")
    assert '"last"' not in text
    assert "registry" not in text


@pytest.mark.parametrize("command", ["test", "validate"])
def test_a_run_without_its_best_checkpoint_names_its_last(finished, capsys, command):
    run = RunFolder.create(Path("runs"), "cut")
    (run.path / "config.yaml").write_bytes((finished / "circuit/version_0/config.yaml").read_bytes())
    run.checkpoint("last").parent.mkdir()
    run.checkpoint("last").write_bytes((finished / "circuit/version_0/checkpoints/last.ckpt").read_bytes())
    message = said(capsys, command, "--run", str(run.path), status=2)
    assert f"There is no checkpoint at {run.checkpoint('best')}" in message
    assert "--ckpt last" in message
    assert "/kl" in said(capsys, command, "--run", str(run.path), "--ckpt", "last", status=0)


def test_before_a_training_it_is_said_how_well_the_clean_model_does(capsys):
    data = ["--data", "IOI", "--data.n_validation", "16", "--data.n_test", "4", "--data.batches_per_epoch", "1"]
    trainer = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    shown = said(capsys, "fit", "--model", "ConstantsModule", "--model.alone", "m2", *data, *trainer, status=0)
    assert re.search(r"clean model on 16 validation prompts: accuracy .*, logit difference \d", shown)
    assert "Warning: the clean model" not in shown
    assert shown.index("clean model on 16") < shown.index("training: 1 step")


def test_the_command_in_the_log_can_be_pasted(capsys):
    name = "it's [new] $HOME"
    said(capsys, *FIT, "--experiment", name, "--quiet", status=0)
    log = (Path("runs") / name / "version_0" / "run.log").read_text()
    (command,) = re.findall(r"INFO +(oa-train fit .*)", log)
    assert shlex.split(command) == ["oa-train", *FIT, "--experiment", name, "--quiet"]


def test_a_finished_run_that_is_resumed_says_so_and_makes_no_version(finished, capsys):
    run = RunFolder(finished / "circuit" / "version_0")
    words = shlex.split(run.resume_command())[1:]
    message = said(capsys, *words, status=0)
    assert f"{run.path} is finished already, so nothing was done." in message
    assert [path.name for path in run.path.parent.iterdir()] == ["version_0"]
    # What is asked for is done.
    said(capsys, *words, "--trainer.max_steps", "2", "--trainer.default_root_dir", "more", status=0)
    assert read_checkpoint(Path("more/circuit/version_0/checkpoints/last.ckpt"))["global_step"] == 2
    # A run whose results were damaged since is finished again.
    message = said(capsys, *words, "--trainer.default_root_dir", "again", status=0)
    again = RunFolder(Path("again/circuit/version_0"))
    (again.path / "circuit" / "tensors.safetensors").unlink(missing_ok=True)
    for file in (again.path / "circuit").iterdir():
        file.unlink()
    assert "run: again/circuit/version_1" in said(capsys, *shlex.split(again.resume_command())[1:], status=0)


def test_groups_of_an_optimiser_that_contradict_the_module_are_a_mistake(finished, capsys):
    checkpoint = read_checkpoint(finished / "circuit/version_0/checkpoints/last.ckpt")
    first, second = checkpoint["optimizer_states"][0]["param_groups"]
    second["params"] += first["params"][1:]
    del first["params"][1:]
    second["params"].pop()
    Path("best.ckpt").write_bytes((finished / "circuit/version_0/checkpoints/best.ckpt").read_bytes())
    torch.save(checkpoint, "odd.ckpt")
    message = said(capsys, *FIT, "--ckpt_path", "odd.ckpt", "--trainer.max_steps", "3", status=2)
    assert "The checkpoint is damaged or of another version" in message
    assert not Path("runs").exists()


def test_runs_are_listed_with_their_figures(finished, capsys):
    cut = RunFolder.create(finished, "cut")
    cut.save_config({"lm": {"name": "a/model"}, "data": "IOI", "experiment": "cut"})
    shown = said(capsys, "runs", "--output", str(finished), status=0)
    rows = {row["run"]: row for row in runs(["--output", str(finished)])}
    row = rows["circuit/version_0"]
    results = json.loads((finished / "circuit/version_0/studies/fit_0/results.json").read_text())
    assert row["state"] == "finished"
    assert (row["model"], row["task"]) == ("tiny", "IOI")
    assert row["size"] == f"{results['circuit']['nodes']} of 15 nodes"
    assert row["KL"].startswith(f"{results['metrics']['kl']['mean']:.3g} ± ")
    accuracy = results["metrics"]["accuracy"]
    assert row["accuracy"] == f"{accuracy['mean']:.3g} " + "[{:.2g}, {:.2g}]".format(*accuracy["ci95"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", row["date"])
    assert (rows["cut/version_0"]["state"], rows["cut/version_0"]["model"]) == ("no checkpoint", "model")
    for text in (row["run"], row["size"], row["state"], "cut/version_0"):
        assert text in shown
    assert "There are no runs in ." in said(capsys, "runs", "--output", ".", status=0)
    assert "expected a folder that holds runs" in said(capsys, "runs", status=2)
    assert "Did you mean --output?" in said(capsys, "runs", "--outptu", "x", status=2)
    (cut.path / "config.yaml").unlink()
    cut.path.rmdir()
    cut.path.parent.rmdir()


def test_circuits_side_by_side_are_listed_one_by_one():
    run = RunFolder.create(Path("runs"), "front")
    run.save_config({"lm": {"name": "tiny"}, "data": "IOI", "experiment": "front"})
    metric = {"mean": 0.5, "stderr": 0.1, "ci95": [0.3, 0.7], "n": 8}
    row = {"number": 1, "edges": 1200, "edges_total": 70651, "kl": metric, "accuracy": metric}
    results = {"ablation": "optimal", "rows": [row | {"ablation": name} for name in ("optimal", "mean")]}
    (run.path / "studies/fit_0").mkdir(parents=True)
    (run.path / "studies/fit_0/results.json").write_text(json.dumps(results))
    (listed,) = runs([])
    assert listed["run"] == "front/version_0/front/1"
    assert (listed["size"], listed["KL"]) == ("1,200 of 70,651 edges", "0.5 ± 0.2")


def test_runs_are_listed_without_torch(finished):
    code = (
        "import sys; from oa_train.cli.main import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "runs", "--output", str(finished)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_how_to_resume_promises_no_exactness_with_stochastic_weight_averaging():
    run = RunFolder.create(Path("runs"), "averaged")
    run.checkpoint("last").parent.mkdir()
    run.checkpoint("last").write_bytes(b"")
    run.save_config(yaml.safe_load("trainer: {callbacks: []}"))
    assert "is lost" in run.how_to_resume()[0]
    run.save_config(yaml.safe_load("trainer: {callbacks: [{class_path: l.StochasticWeightAveraging}]}"))
    sentence, command = run.how_to_resume()
    assert sentence == (
        f"This resumes from {run.checkpoint('last')}, in a new version of the run, but not exactly: "
        "the averages of StochasticWeightAveraging start again:"
    )
    assert command == f"  {run.resume_command()}"
