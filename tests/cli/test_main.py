"""The command line: quick help, configurations that parse, runs that resume from the command line."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from oa_train.cli.fitting import OaTrainCLI
from oa_train.cli.interruption import resume_command
from oa_train.cli.main import main
from oa_train.training.checkpoints import read_checkpoint

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

SMALL = [
    *("--config", str(ROOT / "configs" / "circuit_nodes_tiny.yaml")),
    *("--data.batch_size", "4", "--data.batches_per_epoch", "20", "--trainer.max_epochs", "3"),
    *("--data.n_validation", "32", "--data.n_means", "32", "--data.n_test", "32"),
    *("--finish.refit.steps", "4", "--trainer.enable_progress_bar", "false", "--checkpoint_every", "1"),
]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


def test_help_and_import_load_neither_torch_nor_lightning():
    loaded = "import sys; print(sorted({'torch', 'lightning', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert run_python(f"import oa_train; {loaded}") == "[]\n"
    help_page = "import oa_train.cli.main as m; assert m.main(['--help']) == 0"
    assert run_python(f"{help_page}; {loaded}").endswith("[]\n")


def test_every_public_name_exists_and_unknown_ones_do_not():
    import oa_train

    for name in oa_train.__all__:
        assert getattr(oa_train, name) is not None
    assert "load_model" in dir(oa_train)
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        oa_train.load_modle  # noqa: B018


@pytest.mark.parametrize("command", ["fit", "validate", "test", "compare", "inspect", "demo"])
def test_commands_describe_their_options(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_prints_itself(config, capsys):
    assert main(["fit", "--config", str(config), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"].startswith("oa_train.")
    assert "lm" not in printed["model"]["init_args"]


def test_the_model_is_named_once(tmp_path, monkeypatch):
    built = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OaTrainCLI, "_run_subcommand", lambda self, name: built.update(cli=self))
    assert main(["fit", *SMALL, "--lm.dtype", "bfloat16", "--seed_everything", "7"]) == 0
    cli = built["cli"]
    assert cli.model.frozen.dtype is torch.bfloat16
    assert cli.model.lm == cli.datamodule.task.lm
    assert (cli.model.seed, cli.datamodule.task.seed) == (7, 7)
    assert {p.dtype for p in cli.model.named_trainables().values()} == {torch.float32}


def test_a_run_records_its_configuration_and_is_made_again_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *SMALL, "--trainer.max_epochs", "1"]) == 0
    first = tmp_path / "runs" / "circuit_nodes_tiny" / "version_0"
    recorded = yaml.safe_load((first / "config.yaml").read_text())
    assert recorded["data"]["init_args"]["batch_size"] == 4
    assert recorded["resumed_from"] is None
    assert main(["fit", "--config", str(first / "config.yaml")]) == 0
    second = first.with_name("version_1")
    states = [read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_option_overrides_a_configuration_wherever_it_stands(capsys):
    assert main(["fit", "--model.penalty", "0.7", *SMALL[:2], "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["penalty"] == 0.7


def test_changes_on_a_resume_are_listed_and_take_effect(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Ends inside the second epoch; the rest of it is made up by the resume.
    assert main(["fit", *SMALL, "--trainer.max_steps", "30"]) == 0
    last = "runs/circuit_nodes_tiny/version_0/checkpoints/last.ckpt"
    capsys.readouterr()
    assert main(["fit", *SMALL, "--ckpt_path", last, "--model.mask_learning_rate", "0.5"]) == 0
    assert "changed since the checkpoint: mask_learning_rate: 0.05 -> 0.5" in capsys.readouterr().out
    checkpoint = read_checkpoint(Path(last.replace("version_0", "version_1")))
    assert checkpoint["global_step"] == 60
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5


def test_fast_dev_run_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *SMALL, "--trainer.fast_dev_run", "true"]) == 0
    assert not (tmp_path / "runs").exists()


SEVERAL = ("--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices")


def start(folder: Path, *more: str, n_processes: int = 1) -> subprocess.Popen:
    several = [*SEVERAL, str(n_processes)] if n_processes > 1 else []
    command = [sys.executable, "-m", "oa_train.cli.main", "fit", *SMALL, *several, *more]
    with (folder / "said.txt").open("wb") as said:
        # In a session of its own, so that all processes of a run can be killed at once.
        return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, start_new_session=True)


QUICK_KILLS = [(1, 0), (1, 1), (1, 2), (2, 0)]
KILLS = [(1, attempt) for attempt in range(20)] + [(2, attempt) for attempt in range(10)]


@pytest.mark.parametrize(
    ("n_processes", "attempt"),
    [kill if kill in QUICK_KILLS else pytest.param(*kill, marks=pytest.mark.long) for kill in KILLS],
)
def test_killed_at_a_random_step_and_resumed_it_ends_bit_for_bit_the_same(tmp_path, n_processes, attempt, whole_runs):
    uninterrupted = whole_runs(n_processes)
    first = start(tmp_path, n_processes=n_processes)
    last = tmp_path / "runs" / "circuit_nodes_tiny" / "version_0" / "checkpoints" / "last.ckpt"
    while not last.exists():
        assert first.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.2))
    with suppress(ProcessLookupError):  # it may have ended
        os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() in (-signal.SIGKILL, 0)
    second = start(tmp_path, "--ckpt_path", str(last), n_processes=n_processes)
    assert second.wait() == 0, (tmp_path / "said.txt").read_text()
    resumed = last.parent.parent.with_name("version_1")
    given, expected = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (resumed, uninterrupted))
    assert given["global_step"] == expected["global_step"] == 60
    assert given["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(given["state_dict"][name], tensor), name
    for artefact in ("circuit", "constants"):
        contents = [(run / artefact / "tensors.safetensors").read_bytes() for run in (resumed, uninterrupted)]
        assert contents[0] == contents[1], artefact
    assert yaml.safe_load((resumed / "config.yaml").read_text())["resumed_from"] == str(last)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Runs that were never interrupted, by their number of processes."""

    @cache
    def made(n_processes: int) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted")
        whole = start(folder, n_processes=n_processes)
        assert whole.wait() == 0, (folder / "said.txt").read_text()
        return folder / "runs" / "circuit_nodes_tiny" / "version_0"

    return made


def test_a_loss_that_is_not_finite_ends_with_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = main(["fit", *SMALL, "--model.constants_learning_rate", "1e36", "--model.mask_learning_rate", "0.5"])
    assert status == 1
    said = capsys.readouterr().err
    assert "no longer finite" in said
    assert "Traceback" not in said
    last = tmp_path / "runs" / "circuit_nodes_tiny" / "version_0" / "checkpoints" / "last.ckpt"
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(last)["state_dict"].values())


@pytest.mark.parametrize(
    ("sent", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_run_that_is_interrupted_says_how_to_resume(tmp_path, sent, status, said):
    run = start(tmp_path, "--trainer.max_epochs", "500")
    last = tmp_path / "runs" / "circuit_nodes_tiny" / "version_0" / "checkpoints" / "last.ckpt"
    while not last.exists():
        assert run.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.05)
    run.send_signal(sent)
    assert run.wait(timeout=60) == status
    words = (tmp_path / "said.txt").read_text()
    assert said in words
    assert read_checkpoint(last)["global_step"] > 0
    assert resume_command(last.parent.parent.relative_to(tmp_path)) in words
    log = (last.parent.parent / "run.log").read_text()
    assert log.splitlines()[-1].strip().startswith("oa-train fit --config runs/")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_refit_is_finished_by_the_command_that_it_says(tmp_path, sent, status):
    # Without progress bars the passes after the training would not be recorded.
    bars = ("--trainer.enable_progress_bar", "true", "--quiet")
    run = start(tmp_path, "--trainer.max_epochs", "1", "--finish.refit.steps", "100000", *bars)
    folder = tmp_path / "runs" / "circuit_nodes_tiny" / "version_0"
    log = folder / "run.log"
    while not log.exists() or "refitting the constants" not in log.read_text():
        assert run.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.05)
    time.sleep(0.5)
    run.send_signal(sent)
    assert run.wait(timeout=60) == status
    words = (tmp_path / "said.txt").read_text()
    command = resume_command(folder.relative_to(tmp_path))
    assert command in words
    assert "Traceback" not in words
    assert (folder / "circuit").is_dir()
    assert not (folder / "constants").exists()
    more = [*command.split()[1:], "--finish.refit.steps", "1", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "oa_train.cli.main", *more], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    finished = folder.with_name("version_1")
    assert (finished / "studies" / "fit_0" / "results.json").is_file()
    steps = [read_checkpoint(one / "checkpoints" / "last.ckpt")["global_step"] for one in (folder, finished)]
    assert steps == [20, 20]
