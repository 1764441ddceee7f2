"""One run, one folder: where runs are written, who may write there, and that nothing computed is lost."""

import io
import json
import os
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch

from oa_train.cli.main import main
from oa_train.models.spec import LMSpec, builtin_models
from oa_train.studies.run_folder import RunFolder, output_root
from oa_train.studies.study import Study
from tests.jobs.fits import ROOT

BRIEF = [
    *("--data.n_test", "8", "--data.n_validation", "8", "--data.n_means", "8", "--data.batch_size", "4"),
    *("--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false", "--finish.refit.steps", "0"),
    *("--trainer.accelerator", "cpu", "--data.batches_per_epoch", "1"),
]
FIT = ["fit", "--model", "CircuitModule", "--data", "IOI", *BRIEF]
# Six digits too many for Python to print.
HUGE = "1" * 5000


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("root")
    assert main([*FIT, "--trainer.default_root_dir", str(root)]) == 0
    return root / "circuit" / "version_0"


def refused(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("oa-train: error: ")
    assert "Traceback" not in said
    assert not list(Path().rglob("version_*"))
    return said


def test_relative_paths_of_model_and_prompts_are_found_from_another_folder(monkeypatch):
    shutil.copytree(builtin_models()["tiny"], "model")
    prompts = "".join(
        json.dumps({"prompt": f"Then, {a} and {b} went to the park. {a} gave a book to", "answer": b}) + "\n"
        for a, b in permutations(("Anna", "Paul", "Tom", "Mary", "Peter"), 2)
    )
    Path("a.jsonl").write_text(prompts)
    words = ["--data", "Records", "--data.path", "a.jsonl", "--lm.name", "model", "--trainer.max_steps", "1"]
    words += ["--model", "CircuitModule", "--finish.refit.steps", "0", "--trainer.accelerator", "cpu", "--quiet"]
    assert main(["fit", *words]) == 0
    run = RunFolder(Path("runs/circuit/version_0").absolute())
    config = run.config()
    assert config["data"]["init_args"]["path"] == str(Path("a.jsonl").absolute())
    assert config["lm"]["name"] == str(Path("model").absolute())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["test", "--run", str(run.path), "--ckpt", "last", "--quiet"]) == 0


def test_a_run_keeps_all_that_makes_its_model_but_no_leave_to_run_code(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "adapter").mkdir()
    stored = {"name": "owner/model", "gguf_file": "a.gguf", "adapter": str(tmp_path / "adapter"), "dtype": "auto"}
    run.save_config({"lm": stored | {"trust_remote_code": True}})
    assert run.lm() == LMSpec(**stored)
    run.save_config({"lm": {"name": "owner/model", "quantization": "4bit"}})
    assert run.lm().quantization == "4bit"


def test_a_tilde_is_the_home_directory_and_another_version_follows():
    for version in ("version_0", "version_1"):
        assert main([*FIT, "--trainer.default_root_dir", "~/oa_runs"]) == 0
        folder = Path("home/oa_runs/circuit") / version
        written = {path.name for path in folder.iterdir()}
        assert {"config.yaml", "run.log", "checkpoints", "circuit", "constants", "studies", "metrics.csv"} <= written
    assert sorted(path.name for path in Path().iterdir()) == ["home"]


@pytest.mark.parametrize("leftover", ["RANK", "LOCAL_RANK"])
def test_a_stray_rank_leaves_a_finished_run_alone(run, monkeypatch, capsys, leftover):
    from lightning.pytorch.utilities import rank_zero_only

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setenv(leftover, "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert main([*FIT, "--trainer.default_root_dir", str(run.parent.parent)]) == 0
    assert f"{leftover}=1 in the environment is ignored" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    versions = sorted(run.parent.iterdir(), key=lambda path: RunFolder(path).version)
    assert (versions[-1] / "studies" / "fit_0" / "results.json").is_file()
    assert versions[-1] != run


def test_a_stray_rank_beside_several_devices_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    said = refused(capsys, *FIT, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert "LOCAL_RANK=1 in the environment makes this process another's helper" in said
    assert "unset LOCAL_RANK" in said


@pytest.mark.parametrize("link", ["runs", "runs/circuit"])
def test_links_that_lead_nowhere_are_told(capsys, link):
    Path(link).parent.mkdir(exist_ok=True)
    Path(link).symlink_to("/nonexistent")
    assert "is a link to /nonexistent, which is missing." in refused(capsys, *FIT)


def test_a_study_folder_that_is_a_link_to_nowhere_is_told(run, capsys):
    studies = RunFolder.create(Path("runs"), "linked").path
    for name in ("config.yaml", "circuit", "constants"):
        (studies / name).symlink_to(run / name)
    (studies / "studies").symlink_to("/nonexistent")
    assert main(["minimal", "--run", str(studies)]) == 2
    assert "is a link to /nonexistent, which is missing." in capsys.readouterr().err


def test_addresses_are_no_folders(capsys):
    assert "runs are written to local folders only" in refused(capsys, *FIT, "--trainer.default_root_dir", "s3://b/x")
    assert not Path("s3:").exists()
    assert output_root("--output", "~/x") == Path.home() / "x"


@pytest.mark.parametrize("experiment", ["sweep[/x]", "lr[low]", "[bold]b"])
def test_names_are_never_markup(capsys, experiment):
    assert main([*FIT, "--experiment", experiment]) == 0
    assert f"runs/{experiment}/version_0" in capsys.readouterr().out
    run = Path("runs") / experiment / "version_0"
    assert str(run) in (run / "run.log").read_text()
    assert json.loads((run / "studies/fit_0/results.json").read_text())["experiment"].endswith(
        "]/version_0" if "/" in experiment else f"{experiment}/version_0"
    )


class Broken(io.TextIOWrapper):
    """A pipe that nobody reads."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def full() -> io.TextIOWrapper:
    stream = Broken()
    stream.write = lambda text: (_ for _ in ()).throw(BlockingIOError(11, "Resource temporarily unavailable"))
    return stream


@pytest.mark.parametrize(("stream", "status"), [(Broken, 141), (full, 0)])
def test_an_output_that_nobody_reads_loses_no_results(monkeypatch, stream, status):
    monkeypatch.setattr(sys, "stdout", stream())
    assert main(FIT) == status
    assert (Path("runs/circuit/version_0/studies/fit_0") / "results.json").is_file()
    assert "held-out prompts" in Path("runs/circuit/version_0/run.log").read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_our_characters_loses_no_results(monkeypatch, encoding):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(FIT) == 0
    assert (Path("runs/circuit/version_0/studies/fit_0") / "results.json").is_file()
    output.seek(0)
    assert ("+-" if encoding == "ascii" else "±") in output.read()


def test_a_study_claims_its_folder_before_the_work(run, monkeypatch, capsys):
    claimed = []
    monkeypatch.setattr(
        Study, "claim", lambda self, folder: claimed.append(folder) or (_ for _ in ()).throw(OSError())
    )
    monkeypatch.setattr("oa_train.studies.minimal.Minimal.run", lambda self: pytest.fail("worked before it claimed"))
    assert main(["minimal", "--run", str(run), "--device", "cpu"]) == 1
    assert claimed == [run]


def test_a_study_that_fails_leaves_no_folder(run, monkeypatch, capsys):
    before = sorted((run / "studies").iterdir())
    monkeypatch.setattr("oa_train.studies.study.circuit_behaviour", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert main(["minimal", "--run", str(run), "--device", "cpu"]) == 1
    assert sorted((run / "studies").iterdir()) == before
    capsys.readouterr()


def test_results_that_cannot_be_written_are_still_shown(run, monkeypatch, capsys):
    def write_nothing(path, document):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("oa_train.studies.study.write_json", write_nothing)
    words = ["--minimal.fit.steps", "0", "--minimal.random_complements", "0"]
    assert main(["minimal", "--run", str(run), "--device", "cpu", *words]) == 1
    said = capsys.readouterr()
    assert "The circuit without one of its components" in said.out
    assert "cannot be written: [Errno 28] No space left on device" in said.err


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize(
    "callback",
    [
        "{class_path: ModelCheckpoint, init_args: {filename: mine, monitor: val/kl}}",
        "{class_path: EMAWeightAveraging, init_args: {decay: 0.5, use_buffers: false}}",
    ],
)
def test_a_run_with_other_callbacks_of_training_is_tested(capsys, callback):
    Path("more.yaml").write_text(f"trainer: {{callbacks: [{callback}]}}")
    assert main([*FIT, "--config", "more.yaml"]) == 0
    capsys.readouterr()
    assert main(["test", "--run", "runs/circuit/version_0", "--trainer.enable_progress_bar", "false"]) == 0
    assert "test/kl" in capsys.readouterr().out


def test_a_run_that_is_read_only_is_tested(run, capsys):
    words = ["test", "--run", str(run), "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.default_root_dir", "/proc/nowhere"]
    assert main(words) == 0
    assert "test/kl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("trainer: null", "trainer is empty; expected a group of options, or leave it out."),
        ("lm: null", "lm is empty; expected a group of options"),
        ("finish: null", "finish is empty; expected a group of options"),
        ("experiment: 2024-12-31", 'YAML reads as a date; expected a string. Quote it: experiment: "2024-12-31".'),
        ("experiment: 2024", 'which YAML reads as a int; expected a string. Quote it: experiment: "2024".'),
        (f"seed_everything: {HUGE}", "cannot be read as YAML: Exceeds the limit"),
        (
            "model: {class_path: CircuitModule, init_args: {penalty_weight: null}}",
            "CircuitModule.penalty_weight is null; expected",
        ),
        ("data: {class_path: IOI, init_args: {order: null}}", "IOI.order is null; expected a value"),
        ("trainer: {max_epochs: 1}\nlm: {dtype: null}", "lm.dtype is None; expected one of float32"),
        ("trainer: {logger: {class_path: WandbLogger}}", "Requirement 'wandb"),
        ("trainer: {val_check_interval: 0}", "trainer.val_check_interval is 0; expected more (limit_val"),
    ],
)
def test_values_that_cannot_be_meant(capsys, content, said):
    rest = {"model": "CircuitModule", "data": "IOI"}
    lines = [f"{name}: {value}" for name, value in rest.items() if not content.startswith(name)]
    Path("given.yaml").write_text("\n".join([*lines, content]))
    assert said in refused(capsys, "fit", "--config", "given.yaml", *BRIEF)


def test_null_is_taken_where_the_type_admits_it():
    logger = "{class_path: TensorBoardLogger, init_args: {save_dir: logs, name: null}}"
    Path("given.yaml").write_text(f"trainer: {{logger: {logger}}}")
    assert main([*FIT, "--config", "given.yaml"]) == 0


def test_a_study_of_a_run_asks_nothing_of_the_current_folder(run, monkeypatch, capsys):
    Path("runs").symlink_to("/nonexistent")
    words = ["--minimal.fit.steps", "0", "--minimal.random_complements", "0", "--device", "cpu"]
    assert main(["minimal", "--run", str(run), *words]) == 0


def test_a_huge_number_on_the_command_line(capsys):
    said = refused(capsys, *FIT, "--data.n_test", HUGE)
    assert "data or an argument of it: Exceeds the limit" in said
    assert len(said) < 500


def test_a_model_that_stands_for_its_group_in_a_run(capsys):
    Path("old").mkdir()
    Path("old/config.yaml").write_text("lm: tiny\nmodel: CircuitModule\ndata: IOI")
    for command in ("test", "compare"):
        assert "lm is 'tiny'; expected a group of options (lm.name, " in refused(capsys, command, "--run", "old")


def test_a_mistake_that_needs_no_model_is_told_without_torch():
    Path("bad.yaml").write_text("trainer: null")
    code = (
        "import sys; from oa_train.cli.main import main; status = main(sys.argv[1:]);"
        "print(sorted({'torch', 'lightning', 'transformers', 'rich'} & set(sys.modules)), status)"
    )
    for words in (["fit", "--config", "bad.yaml"], ["compare", "--run", "x"], ["fitt"], ["test", "--run"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.stdout.splitlines()[-1] in ("[] 2", "[] 0"), (words, done.stdout, done.stderr)


def test_a_study_of_one_circuit_is_not_given_two(run, capsys):
    words = ["--run", str(run), "--run", str(run)]
    assert main(["minimal", *words]) == 2
    assert "--run is given 2 times" in capsys.readouterr().err
    assert torch.is_grad_enabled()
