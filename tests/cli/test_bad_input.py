"""Every mistake gets a clear message, status 2, no traceback, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oa_train.cli.main import main
from oa_train.training.checkpoints import WholeFileCheckpointIO
from tests.builders import save_language_model
from tests.jobs.fits import ROOT

FIT = ["fit", "--model", "CircuitModule", "--data", "IOI"]
CHOSEN = "model: CircuitModule\ndata: IOI\n"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def complaint(capsys: pytest.CaptureFixture, *words: str, status: int = 2) -> str:
    assert main(list(words)) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("oa-train: error: ")
    assert not Path("runs").exists()
    return said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        # Names that are not known.
        ("--modle.width 3", "There is no option --modle.width."),
        ("--trainer.max_epoch 3", "There is no option --trainer.max_epoch. Did you mean trainer.max_epochs"),
        ("--trainer.max_ep 3", "There is no option --trainer.max_ep."),
        ("--lm.nam tiny", "There is no option --lm.nam. Did you mean lm.name?"),
        ("--quite", "There is no option --quite. Did you mean quiet?"),
        ("-x", "There is no option -x. Valid names: "),
        ("-- foo", "These words belong to no option: "),
        ("--finish.refit.step 0", "There is no option --finish.refit.step. Did you mean finish.refit.steps"),
        ("--model.penalti_weight 3", "CircuitModule has no argument 'penalti_weight'. Did you mean penalty_weight"),
        ("--model.foo.bar 3", "CircuitModule has no argument 'foo.bar'. Valid names: "),
        ("--model.masks.window 3", "UniformGradientSampling has no argument 'window'. Did you mean window_scale?"),
        ("--model.masks.init_args.foo 3", "UniformGradientSampling has no argument 'foo'. Valid names: initial_logit"),
        ("--model.masks HardConcrete --model.masks.temprature 1", "Did you mean temperature"),
        ("--data.foo 3", "IOI has no argument 'foo'. Valid names: "),
        ("--data Induction --data.order ABBA", "Induction has no argument 'order'. Valid names: length"),
        ("--data Induction --data.order ABBA", ". (IOI"),
        # Classes, part by part.
        ("--model circuitmodule", "model is 'circuitmodule', which is not a known class. Did you mean Circuit"),
        ("--model.masks HardConcret", "masks is 'HardConcret', which is not a known class. Did you mean HardC"),
        ("--trainer.callbacks+=EarlyStoping", "Did you mean EarlyStopping?"),
        ("--data nosuch.IOI", "data is 'nosuch.IOI', which cannot be imported: ModuleNotFoundError: No module"),
        ("--data oa_train.taks.IOI", "No oa_train attribute taks.\nDid you mean oa_train.tasks.ioi.IOI"),
        (
            "--data oa_train.tasks.IOIx",
            "'oa_train.tasks' has no attribute 'IOIx'.\nDid you mean oa_train.tasks.ioi.IOI",
        ),
        ("--data needs_more.X", "ModuleNotFoundError: No module named 'nosuchthing' (raised in <module> ("),
        ("--data raises.X", "data is 'raises.X', which cannot be imported: RuntimeError: boom (raised in"),
        ("--model.class_path os.path.join", "model is 'os.path.join', which is a function, not a class."),
        (
            "--model IOI",
            "expected a kind of FrozenModelModule: CircuitModule, ConstantsModule, LensModule, TracingModule.",
        ),
        ("--model torch.nn.Linear", "model is 'torch.nn.Linear', which is not a FrozenModelModule"),
        ("--data Task", "data is 'Task', which is abstract; expected a kind of Task: "),
        # Values.
        ("--data.batch_size 0", "batch_size is 0; expected at least 1."),
        ("--data.batch_size x", "batch_size is 'x'; expected an integer."),
        ("--data.order abba", "order is 'abba'; expected one of mixed, ABBA, BABA. Did you mean ABBA?"),
        ("--data.n_test 1", "n_test is 1; expected at least 2."),
        ("--data.distractor_names -1", "distractor_names is -1.0; expected a probability from 0 to 1."),
        ("--model.level edge", "level is 'edge'; expected one of nodes, edges. Did you mean edges"),
        ("--model.penalty_weight -1", "penalty_weight is -1.0; expected a price in nats"),
        ("--model.penalty_weight .nan", "penalty_weight is nan; expected a price in nats"),
        ("--model.threshold 1.5", "threshold is 1.5; expected a keep-probability between 0 and 1"),
        ("--model.threshold 0", "threshold is 0.0; expected a keep-probability"),
        ("--model.threshold", "--model or an argument of it needs a value."),
        ("--model.ablation optimum", "Did you mean optimal?"),
        (
            "--model.components a9.h1",
            "The pattern 'a9.h1' matches no component of the kinds heads, mlp. Did you mean a",
        ),
        ("--model.components []", "components is [], which selects nothing that could be trained."),
        ("--model.samples_per_prompt 0", "samples_per_prompt is 0; expected more than 0."),
        ("--model.mask_learning_rate -0.1", "mask_learning_rate is -0.1; expected more than 0."),
        ("--lm.name tinny --lm.local_files_only true", "The model 'tinny' cannot be loaded"),
        ("--lm.name tinny --lm.local_files_only true", "Did you mean tiny?"),
        ("--lm.name ./nowhere", "lm.name is './nowhere', which does not exist.\nExpected a directory that "),
        ("--lm.name .", "lm.name is '.', a directory that has no config.json."),
        ("--lm.name=", "lm.name is empty; expected a built-in name"),
        ("--lm.dtype float31", "lm.dtype is 'float31'; expected one of float32, bfloat16, float16, float64, auto."),
        ("--lm.dtype", "--lm.dtype needs a value."),
        ("--lm tiny", "lm is 'tiny'; expected a group of options (lm.name, "),
        ("--seed_everything abc", "seed_everything is 'abc'; expected an integer."),
        ("--seed_everything true", "seed_everything is True; expected an integer."),
        ("--seed_everything -4", "seed_everything is -4; expected an integer from 0 to 4294967295."),
        ("--experiment", "--experiment needs a value."),
        ("--experiment ../../x", "experiment is '../../x'; expected a name"),
        ("--checkpoint_every 0", "checkpoint_every is 0; expected at least 1."),
        ("--finish.refit_start meen", "finish.refit_start is 'meen'; expected one of trained, mean, both."),
        ("--finish.refit.steps -3", "steps is -3; expected at least 0."),
        ("--ckpt_path nope.ckpt", "There is no checkpoint at nope.ckpt."),
        ("--ckpt_path .", ". is a folder, not a checkpoint."),
        ("--ckpt_path last", "--ckpt_path is 'last', which Lightning would look for"),
        # What is given once, at the top.
        ("--model.lm.name gpt2", "--model.lm.name cannot be given to a class: lm is given once, at the top"),
        ("--data.init_args.seed=3", "seed_everything is given once, at the top"),
        # The trainer.
        ("--trainer.accelerator gpuu", "You selected an invalid accelerator name"),
        ("--trainer.max_epochs many", "trainer.max_epochs is 'many'; expected an integer"),
        (
            "--trainer.max_steps -7",
            "`max_steps` must be a non-negative integer or -1 (infinite steps). You passed in -7.",
        ),
        ("--trainer.devices 0", "`Trainer(devices='0')` value is not a valid input"),
        ("--trainer.devices=-3 --trainer.accelerator cpu", "`CPUAccelerator` should be an int > 0"),
        ("--trainer.gradient_clip_val -1", "trainer.gradient_clip_val is -1; expected at least 0."),
        ("--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches is 0; expected at least 1."),
        ("--trainer.val_check_interval 99", "trainer.val_check_interval is 99, but an epoch has 50 batches"),
        ("--trainer.precision bf16-true", "lm.dtype is float32; give --lm.dtype bfloat16. What is trained is float32"),
        ("--trainer.precision bf16-true --lm.dtype auto", "a frozen model in bfloat16, and lm.dtype is float32"),
        ("--trainer.precision 64-true", "trainer.precision is '64-true'; expected 32-true, bf16-mixed, bf16-true"),
        ("--trainer.precision fp12", "trainer.precision is 'fp12'; expected 32-true, bf16-mixed, bf16-true"),
        ("--trainer.strategy deepspeed", "would shard masks and constants as well. For models too large for one"),
        *(
            (f"--trainer.strategy {kind}", "which is for notebooks")
            for kind in ("ddp_spawn", "ddp_fork", "ddp_notebook")
        ),
        (
            "--trainer.strategy DDPStrategy --trainer.strategy.start_method fork",
            "trainer.strategy is 'DDPStrategy' with start_method fork, which is for notebooks",
        ),
        ("--trainer.strategy FSDPStrategy", "trainer.strategy is 'FSDPStrategy', which would shard masks"),
        ("--trainer.strategy ModelParallelStrategy", "there is fsdp, which shards the frozen model; else ddp"),
        ("--lm.device_map auto", "There is no option --lm.device_map. Masks and constants are on one device"),
        ("--trainer.precision 16-mixed --trainer.accelerator cpu", "16-mixed needs a GPU"),
        ("--trainer.logger nologger", "trainer.logger is 'nologger', which is not a known class. Did you mean"),
        ("--trainer.default_root_dir raises.py/x", "raises.py is a file, not a folder."),
    ],
)
def test_wrong_options_of_fit(capsys, monkeypatch, options, said):
    Path("needs_more.py").write_text("import nosuchthing")
    Path("raises.py").write_text("raise RuntimeError('boom')")
    monkeypatch.syspath_prepend(".")
    assert said in complaint(capsys, *FIT, *options.split())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [1\nb: {", "cannot be read as YAML"),
        ("a:\n\t- b", "cannot be read as YAML"),
        ("", "The configuration given.yaml is empty; expected named options."),
        ("# nothing", "The configuration given.yaml is empty"),
        ("just text", "The configuration given.yaml holds a str; expected named options"),
        ("- a\n- b", "The configuration given.yaml holds a list; expected named options"),
        (f"{CHOSEN}seed_everything: 1\nseed_everything: 2", "'seed_everything' occurs twice"),
        (f"{CHOSEN}modle: 3", "There is no option modle (in the configuration). Did you mean model"),
        (f"{CHOSEN}trainer: {{max_epoch: 3}}", "Did you mean trainer.max_epochs"),
        (f"{CHOSEN}trainer: {{max_epochs: [1, 2]}}", "trainer.max_epochs is [1, 2]; expected an integer."),
        (f"{CHOSEN}trainer: 5", "trainer is 5; expected a group of options (trainer.accelerator, "),
        (f"{CHOSEN}finish: {{refit: 3}}", "finish.refit is 3; expected a group of options (finish.refit.steps, "),
        (f"{CHOSEN}lm: tiny", "lm is 'tiny'; expected a group of options (lm.name, "),
        (f"{CHOSEN}lm: {{name: [tiny]}}", "lm.name is ['tiny']; expected a string."),
        (f"{CHOSEN}experiment: [a, b]", "experiment is ['a', 'b']; expected a string."),
        ("model: [CircuitModule]\ndata: IOI", "model is ['CircuitModule']; expected the name of a class"),
        (
            "model: {class_path: CircuitModule, init_args: {penaltie_weight: 1}}\ndata: IOI",
            "Did you mean penalty_weight",
        ),
        ("model: {class_path: CircuitModule, penalty_weight: 1}\ndata: IOI", "its arguments belong under init_args."),
        (
            "model: {class_paht: CircuitModule}\ndata: IOI",
            "There is no argument 'class_paht' here. Did you mean class_p",
        ),
        (
            "model: {class_path: CircuitModule, init_args: {components: [3]}}\ndata: IOI",
            "components is [3]; expected a",
        ),
        ("model: {class_path: CircuitModule, init_args: {seed: 3}}\ndata: IOI", "seed_everything is given once"),
        ("model: CircuitModul\ndata: IOI", "model is 'CircuitModul', which is not a known class. Did you mean Ci"),
        (
            "model: {class_path: oa_train.training.circits.X}\ndata: IOI",
            "has no attribute 'circits'.\nDid you mean oa_train.training.circ",
        ),
        ("model: CircuitModule\ndata: IOY", "data is 'IOY', which is not a known class. Did you mean IOI"),
        ("model: CircuitModule\ndata: 3", "data is 3; expected the name of a class"),
        ("model: CircuitModule\ndata: {class_path: IOI, init_args: [1]}", "data.init_args is [1]; expected named arg"),
        ("model: CircuitModule", "Missing: --data."),
        ("data: {class_path: IOI, init_args: {order: XX}}\nmodel: CircuitModule", "expected one of mixed, ABBA, BABA"),
    ],
)
def test_wrong_configurations(capsys, content, said):
    Path("given.yaml").write_text(content)
    assert said in complaint(capsys, "fit", "--config", "given.yaml")


def test_configurations_that_are_no_files(capsys):
    Path("near.yaml").write_text("data: IOI")
    assert "does not exist. Did you mean near.yaml?" in complaint(capsys, "fit", "--config", "nope.yaml")
    Path("folder.yaml").mkdir()
    assert "'folder.yaml' is a folder." in complaint(capsys, "fit", "--config", "folder.yaml")
    Path("binary.yaml").write_bytes(bytes(range(256)))
    assert "cannot be read as YAML" in complaint(capsys, "fit", "--config=binary.yaml")
    assert "--config needs a value" in complaint(capsys, "fit", "--config")


def test_an_unsupported_family_lists_the_supported_ones(capsys):
    Path("rwkv").mkdir()
    Path("rwkv/config.json").write_text('{"model_type": "rwkv"}')
    said = complaint(capsys, *FIT, "--lm.name", "./rwkv")
    assert "Models of the family 'rwkv' are not supported. Valid names: gpt2, gpt_neo, gptj" in said
    assert "docs/extending.md" in said


def test_words_that_the_tokenizer_splits(capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    save_language_model("gpt2", Path("model"))
    tokenizer = Tokenizer(models.WordLevel({"<bos>": 0, "the": 1}, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained("model")
    said = complaint(capsys, *FIT, "--lm.name", "./model")
    assert "names" in said
    assert " 0 of " in said


def test_files_that_are_no_checkpoints(capsys):
    Path("text.ckpt").write_text("hello")
    torch.save({"weights": 1}, "other.ckpt")
    WholeFileCheckpointIO().save_checkpoint({"oa_train": {"identity": {}}, "state_dict": {}}, "half.ckpt")
    Path("half.ckpt").write_bytes(Path("half.ckpt").read_bytes()[:300])
    assert "truncated, damaged, or no checkpoint" in complaint(capsys, *FIT, "--ckpt_path", "text.ckpt")
    assert "truncated, damaged, or no checkpoint" in complaint(capsys, *FIT, "--ckpt_path", "half.ckpt")
    assert "is no checkpoint of oa_train" in complaint(capsys, *FIT, "--ckpt_path", "other.ckpt")


def test_checkpoints_of_something_else(capsys):
    small = ["--data.n_means", "16", "--data.n_validation", "16", "--data.n_test", "16", "--finish.refit.steps", "0"]
    quick = ["--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false", "--checkpoint_every", "1"]
    assert (
        main([*FIT, *small, *quick, "--trainer.default_root_dir", "elsewhere", "--data.batches_per_epoch", "1"]) == 0
    )
    capsys.readouterr()
    resume = ["--ckpt_path", "elsewhere/circuit/version_0/checkpoints/last.ckpt"]
    said = complaint(capsys, *FIT, *resume, "--model.components", "a*")
    assert "components: the checkpoint has" in said
    assert "config.yaml" in said
    assert "task.order: the checkpoint has mixed, this configuration ABBA" in complaint(
        capsys, *FIT, *resume, "--data.order", "ABBA"
    )
    save_language_model("gpt2", Path("model"))
    assert "model.fingerprint" in complaint(capsys, *FIT, *resume, "--lm.name", "./model")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fitt", "There is no command 'fitt'. Did you mean fit?"),
        (
            "",
            "Commands: demo, fit, validate, test, compare, scan, curve, interact, sufficient, trace, compare_lenses, "
            "faithfulness, lens, minimal, robustness, "
            "study, runs, check-data, ",
        ),
        ("--bogus", "There is no option --bogus"),
        ("compare", "compare needs --run"),
        ("compare --run nowhere", "--run is 'nowhere', a folder that does not exist."),
        ("compare --run", "--run needs a value."),
        ("test --run nowhere", "--run is 'nowhere', a folder that does not exist."),
        ("test --ckpt best", "name the run with --run"),
        ("test --model CircuitModule --data IOI", "test needs a trained module: give --run"),
        ("compare --run a --device", "--run is 'a', a folder that does not exist."),
        ("test --rnu a", "There is no option --rnu. Did you mean run?"),
        ("--versoin", "There is no option --versoin before the command. Did you mean --version?"),
        ("-q", "No command was given."),
        ("demo --outpt x", "There is no option --outpt. Did you mean output?"),
        ("demo --output", "--output needs a value."),
        ("demo extra", "These words belong to no option: extra"),
    ],
)
def test_wrong_commands(capsys, words, said):
    assert said in complaint(capsys, *words.split())


@pytest.mark.parametrize(
    "stored",
    [
        "lm: {name: tiny, trust_remote_code: true}",
        "lm.trust_remote_code: true",
        "lm: {name: tiny}\nfit: {lm.trust_remote_code: 1}",
    ],
)
def test_a_run_folder_is_not_trusted_to_run_code(capsys, stored):
    Path("shared").mkdir()
    Path("shared/config.yaml").write_text(f"{stored}\ndata: IOI\nmodel: CircuitModule")
    for command in ("test", "compare"):
        said = complaint(capsys, command, "--run", "shared")
        assert "asks to run code that comes with the model" in said
        assert "--lm.trust_remote_code true" in said


def test_a_run_folder_names_no_other_configuration(capsys):
    Path("shared").mkdir()
    Path("shared/config.yaml").write_text("config: other.yaml\nlm: {name: tiny}\ndata: IOI\nmodel: CircuitModule")
    for command in ("test", "validate", "compare"):
        assert "refers to another configuration file" in complaint(capsys, command, "--run", "shared")


def test_a_run_that_was_not_finished_says_how_to_finish_it(capsys):
    Path("broken").mkdir()
    Path("broken/config.yaml").write_text("lm: {name: tiny}\ndata: IOI")
    said = complaint(capsys, "compare", "--run", "broken")
    assert "oa-train fit --config broken/config.yaml --ckpt_path broken/checkpoints/last.ckpt" in said


def test_a_folder_that_is_no_run_names_runs_nearby(capsys):
    Path("things/version_0").mkdir(parents=True)
    Path("things/version_0/config.yaml").write_text("lm: {name: tiny}")
    assert "Runs nearby: things/version_0." in complaint(capsys, "compare", "--run", "things")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("test --ckpt bst", "--ckpt is 'bst'; expected best, last or the path of a file. Did you mean best?"),
        ("test --ckpt nope.ckpt", "There is no checkpoint at nope.ckpt."),
        ("validate", "There is no checkpoint at run/checkpoints/best.ckpt."),
        ("validate --lm.dtype x", "lm.dtype is 'x'; expected one of"),
        ("compare --compare.fit.step 3", "Did you mean compare.fit.steps"),
        ("compare --compare 3", "compare is 3; expected a group of options (compare."),
        ("compare --compare.seed 3", "There is no option --compare.seed; it is called seed_everything now."),
        ("test --run run", "--run is given 2 times: run, run; expected one."),
        ("compare --trainer.max_epochs 3", "There is no option --trainer.max_epochs."),
        ("compare --data.n_test 1", "n_test is 1; expected at least 2."),
        ("compare extra", "These words belong to no option: extra"),
    ],
)
def test_wrong_options_beside_a_run(capsys, words, said):
    Path("run").mkdir()
    Path("run/config.yaml").write_text(CHOSEN if words.startswith(("test", "validate")) else "data: IOI")
    command, *rest = words.split()
    assert said in complaint(capsys, command, "--run", "run", *rest)


def test_the_file_of_a_run_in_place_of_its_folder(capsys):
    Path("config.yaml").write_text("data: IOI")
    assert "which is a file. Give the folder of the run" in complaint(capsys, "compare", "--run", "config.yaml")


# Starts the command without root's right to pass over permissions (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE).
WITHOUT_PRIVILEGE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0);"
    "os.execv(sys.executable, [sys.executable, '-m', 'oa_train.cli.main', *sys.argv[1:]])"
)


def test_a_folder_that_must_not_be_written_to():
    Path("sealed").mkdir()
    Path("sealed").chmod(0o500)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PRIVILEGE, *FIT, "--trainer.default_root_dir", "sealed"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("oa-train: error: trainer.default_root_dir is 'sealed', but the folder ")
    assert "is not writable" in done.stderr
    assert not list(Path("sealed").iterdir())
