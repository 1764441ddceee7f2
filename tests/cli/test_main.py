"""The command line: quick help, configurations that parse, runs that are made again."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from oa_train.cli.lightning_cli import OaTrainCLI
from oa_train.cli.main import main
from oa_train.training.checkpoints import read_checkpoint
from tests.jobs.fits import ROOT, SMALL

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# These are laid over the configuration of an experiment.
OVERLAYS = sorted((ROOT / "configs" / "trainer").glob("*.yaml"))


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
    with pytest.raises(AttributeError, match="No oa_train attribute load_modle"):
        oa_train.load_modle  # noqa: B018


@pytest.mark.parametrize("command", ["fit", "validate", "test", "compare", "minimal", "convert", "inspect", "demo"])
def test_commands_describe_their_options(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_prints_itself(config, capsys):
    command = "scan" if config.stem.startswith("scan") else "fit"
    assert main([command, "--config", str(config), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["class_path"].startswith("oa_train.")
    if command == "fit":
        assert printed["model"]["class_path"].startswith("oa_train.")
        assert "lm" not in printed["model"]["init_args"]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_changes_the_trainer_and_leaves_the_experiment(overlay, capsys):
    printed = []
    for words in ([], ["--config", str(overlay)]):
        assert main(["fit", "--config", str(CONFIGS[0]), *words, "--print_config"]) == 0
        printed.append(yaml.safe_load(capsys.readouterr().out))
    plain, laid_over = printed
    assert plain["trainer"] != laid_over["trainer"]
    for part in ("experiment", "model", "data"):
        assert plain[part] == laid_over[part]


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
    assert main(["fit", "--model.penalty_weight", "0.7", *SMALL[:2], "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["penalty_weight"] == 0.7


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


def test_a_loss_that_is_not_finite_ends_with_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = main(["fit", *SMALL, "--model.constants_learning_rate", "1e36", "--model.mask_learning_rate", "0.5"])
    assert status == 1
    said = capsys.readouterr().err
    assert "no longer finite" in said
    assert "Traceback" not in said
    last = tmp_path / "runs" / "circuit_nodes_tiny" / "version_0" / "checkpoints" / "last.ckpt"
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(last)["state_dict"].values())
