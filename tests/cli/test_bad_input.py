"""Every mistake gets a clear message, status 2, no traceback, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch

from oa_train.cli.main import main
from oa_train.training.checkpoints import WholeFileCheckpointIO
from tests.builders import save_language_model

FIT = ["fit", "--model", "CircuitModule", "--data", "IOI"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def complaint(capsys: pytest.CaptureFixture, *words: str, status: int = 2) -> str:
    assert main(list(words)) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("oa-train: error: ")
    assert not Path("runs").exists() or not list(Path("runs").rglob("version_*"))
    return said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--modle.width 3", "There is no option --modle.width."),
        ("--trainer.max_epoch 3", "There is no option --trainer.max_epoch. Did you mean trainer.max_epochs"),
        ("--trainer.max_ep 3", "There is no option --trainer.max_ep."),
        ("--lm.nam tiny", "There is no option --lm.nam. Did you mean lm.name?"),
        ("--model.penalti 3", "has an argument 'penalti'. Did you mean penalty (of CircuitModule)"),
        ("--model.masks.window 3", "has an argument 'window'. Did you mean window_scale (of UniformGradientSampling)"),
        ("--data.batch_size 0", "batch_size is 0; expected a number of at least 1."),
        ("--data.batch_size x", "batch_size is 'x'; expected a whole number."),
        ("--model.penalty -1", "penalty is -1.0; expected a price in nats"),
        ("--model.penalty .nan", "penalty is nan; expected a price in nats"),
        ("--model.threshold 1.5", "threshold is 1.5; expected a keep-probability between 0 and 1"),
        ("--model.threshold 0", "threshold is 0.0; expected a keep-probability"),
        ("--model.ablation optimum", "ablation is 'optimum'; expected one of zero, mean, optimal."),
        ("--model.components a9.h1", "The pattern 'a9.h1' matches no component. Did you mean a"),
        ("--model.samples_per_prompt 0", "samples_per_prompt is 0; expected more than 0."),
        ("--model.mask_learning_rate -0.1", "mask_learning_rate is -0.1; expected more than 0."),
        ("--lm.name tinny --lm.local_files_only true", "The model 'tinny' cannot be loaded"),
        ("--lm.name tinny --lm.local_files_only true", "Did you mean tiny?"),
        ("--lm.name ./nowhere", "lm.name is './nowhere', a directory that does not exist."),
        ("--lm.name .", "lm.name is '.', a directory that has no config.json."),
        ("--lm.dtype float31", "lm.dtype is 'float31'; expected one of float32, bfloat16, float16, float64."),
        ("--seed_everything abc", "seed_everything is abc; expected true or false or a whole number."),
        ("--trainer.accelerator gpuu", "You selected an invalid accelerator name"),
        ("--trainer.max_epochs many", "trainer.max_epochs is many; expected a whole number"),
        ("--trainer.devices 0", "The trainer cannot be built from these options"),
        ("--trainer.precision bf16-true", "trainer.precision is bf16-true; expected 32-true, bf16-mixed or 16-mixed"),
        ("--trainer.precision 16-mixed --trainer.accelerator cpu", "16-mixed needs a GPU"),
        ("--data.n_test 1", "n_test is 1; expected a number of at least 2."),
        ("--checkpoint_every 0", "checkpoint_every is 0; expected at least 1."),
        ("--finish.refit_start meen", "finish.refit_start is 'meen'; expected one of trained, mean, both."),
        ("--finish.refit.steps -3", "steps is -3; expected 0 or more."),
        ("--ckpt_path nope.ckpt", "There is no checkpoint at nope.ckpt."),
        ("--ckpt_path last", "--ckpt_path is 'last', which Lightning would look for"),
    ],
)
def test_wrong_options_of_fit(capsys, options, said):
    assert said in complaint(capsys, *FIT, *options.split())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [1\nb: {", "cannot be read as YAML"),
        ("just text", "holds str; expected named options."),
        (
            "model: CircuitModule\ndata: IOI\nmodle: 3",
            "There is no option modle (in the configuration). Did you mean model",
        ),
        ("model: CircuitModule\ndata: IOI\ntrainer: {max_epoch: 3}", "Did you mean trainer.max_epochs"),
        ("model: {class_path: CircuitModule, init_args: {penaltie: 1}}\ndata: IOI", "Did you mean penalty"),
        (
            "model: CircuitModul\ndata: IOI",
            "model is 'CircuitModul', which is no class known here. Did you mean Circuit",
        ),
        ("model: CircuitModule\ndata: IOY", "data is 'IOY', which is no class known here. Did you mean IOI"),
        ("model: CircuitModule", "Missing: --data."),
        ("data: {class_path: IOI, init_args: {order: XX}}\nmodel: CircuitModule", "expected one of mixed, ABBA, BABA"),
    ],
)
def test_wrong_configurations(capsys, content, said):
    Path("given.yaml").write_text(content)
    assert said in complaint(capsys, "fit", "--config", "given.yaml")


def test_configurations_that_are_no_files(capsys):
    Path("near.yaml").write_text("data: IOI")
    assert "In .: near.yaml." in complaint(capsys, "fit", "--config", "nope.yaml")
    Path("binary.yaml").write_bytes(bytes(range(256)))
    assert "cannot be read as YAML" in complaint(capsys, "fit", "--config=binary.yaml")
    assert "no configuration file" in complaint(capsys, "fit", "--config")


def test_an_unsupported_family_lists_the_supported_ones(capsys):
    Path("bloom").mkdir()
    Path("bloom/config.json").write_text('{"model_type": "bloom"}')
    said = complaint(capsys, *FIT, "--lm.name", "./bloom")
    assert "Models of the family 'bloom' are not supported. Valid names: gpt2, gpt_neox, llama" in said
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
        ("", "Commands: demo, fit, validate, test, compare."),
        ("--bogus", "There is no option --bogus"),
        ("compare", "compare needs --run"),
        ("compare --run nowhere", "--run is 'nowhere', a folder that does not exist."),
        ("compare --run", "--run needs a value."),
        ("test --run nowhere", "--run is 'nowhere', a folder that does not exist."),
        ("test --ckpt best", "name the run with --run"),
        ("test --model CircuitModule --data IOI", "test needs a trained module: give --run"),
        ("demo --outpt x", "There is no option --outpt. Did you mean output?"),
    ],
)
def test_wrong_commands(capsys, words, said):
    assert said in complaint(capsys, *words.split())


def test_a_run_folder_is_not_trusted_to_run_code(capsys):
    Path("shared").mkdir()
    Path("shared/config.yaml").write_text("lm: {name: tiny, trust_remote_code: true}\ndata: IOI\nmodel: CircuitModule")
    for command in ("test", "compare"):
        said = complaint(capsys, command, "--run", "shared")
        assert "asks to run code that comes with the model 'tiny'" in said
        assert "--lm.trust_remote_code true" in said


def test_a_run_that_was_not_finished_says_how_to_finish_it(capsys):
    Path("broken").mkdir()
    Path("broken/config.yaml").write_text("lm: {name: tiny}\ndata: IOI")
    said = complaint(capsys, "compare", "--run", "broken")
    assert "oa-train fit --config broken/config.yaml --ckpt_path broken/checkpoints/last.ckpt" in said


def test_a_folder_that_is_no_run_names_runs_nearby(capsys):
    Path("things/version_0").mkdir(parents=True)
    Path("things/version_0/config.yaml").write_text("lm: {name: tiny}")
    assert "Runs nearby: things/version_0." in complaint(capsys, "compare", "--run", "things")
