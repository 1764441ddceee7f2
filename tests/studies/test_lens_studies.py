"""Lenses compared, read on one prompt, and tested for faithfulness, as studies."""

import json

import pytest
import torch

from oa_train.cli.main import main
from oa_train.errors import ArtefactError, ConfigurationError, TaskError
from oa_train.lenses.lens import LENS_KINDS
from oa_train.lenses.predictions import Tokens, lens_logits, mean_attention
from oa_train.lenses.trained_lenses import TrainedLenses
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec
from oa_train.models.weights import fingerprint
from oa_train.studies.compare_lenses import CompareLenses, CompareLensesSettings
from oa_train.studies.faithfulness import Faithfulness, FaithfulnessSettings
from oa_train.studies.lens import LensSettings, ReadPrompt
from oa_train.tasks import IOI, Induction
from tests.lenses.test_lens import tuned_lens

PROMPT = "After Richard left, Marcus and Tom went to the library. Tom gave a book to"


@pytest.fixture(scope="module")
def model():
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def task():
    return IOI(n_test=32, n_means=64, evaluation_batch_size=16)


@pytest.fixture(scope="module")
def trained(model, task):
    """Lenses that start where their training would."""
    lenses = {kind: LENS_KINDS[kind].make(range(3), 3, 64).requires_grad_(False) for kind in ("oca", "tuned")}
    lenses["oca"].load(mean_attention(model, task))
    return TrainedLenses("a/run", lenses, 3, 64, {"fingerprint": fingerprint(model)})


@pytest.fixture(scope="module")
def compared(model, task, trained):
    return CompareLenses(model, task, [trained]).run()


def test_each_lens_has_the_divergence_of_its_predictions(model, task, trained, compared):
    for kind in ("oca", "tuned"):
        tokens = [Tokens(model, batch) for batch in task.batches("test", 32)]
        parts = [kl_divergence(t.logits, lens_logits(trained.lenses[kind], model, t, slice(None))) for t in tokens]
        for layer, expected in enumerate(torch.cat(parts, dim=1).mean(dim=1).tolist()):
            (row,) = compared.where(lens=kind, layer=layer)
            assert row["kl"].mean == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert {row["lens"] for row in compared.rows} == {"oca", "tuned", "logit", "mean", "resample"}


def test_equal_lenses_have_equal_figures(compared):
    for layer in range(3):
        oca, mean, tuned, logit = (compared.where(lens=n, layer=layer)[0] for n in ("oca", "mean", "tuned", "logit"))
        assert oca["kl"].mean == pytest.approx(mean["kl"].mean, rel=1e-5)
        assert tuned["kl"].mean == pytest.approx(logit["kl"].mean, rel=1e-5)
        assert mean["kl_minus_oca"].mean == pytest.approx(0, abs=1e-5)
        assert tuned["agreement"].mean == logit["agreement"].mean
    assert compared.facts["reference"] == "oca"


def test_the_depth_is_where_the_models_token_comes_to_stay(model, task, compared):
    depths = []
    for batch in task.batches("test", 32):
        tokens = Tokens(model, batch)
        top = lens_logits(LENS_KINDS["logit"].make(range(3), 3, 64), model, tokens, slice(None)).argmax(-1)
        for column in (top == tokens.logits.argmax(-1)).T.tolist():
            depth = 3
            while depth > 0 and column[depth - 1]:
                depth -= 1
            depths.append(depth)
    assert compared.metrics["depth_logit"].mean == pytest.approx(sum(depths) / len(depths))
    assert 1.5 < compared.metrics["depth_logit"].mean < 3


def test_pieces_of_the_predictions_and_batches_change_nothing(model, trained, compared):
    task = IOI(n_test=32, n_means=64, evaluation_batch_size=16)
    parts = CompareLenses(model, task, [trained], CompareLensesSettings(predictions_at_once=7)).run()
    for row, other in zip(compared.rows, parts.rows, strict=True):
        assert row["kl"].mean == pytest.approx(other["kl"].mean, rel=1e-4, abs=1e-6)


def test_a_prompt_is_read_layer_by_layer(model, task, trained):
    findings = ReadPrompt(model, task, [trained], LensSettings(prompt=PROMPT)).run()
    width = len(task.encoder.encode([PROMPT])[0])
    assert len(findings.rows) == 4 * width
    last = [row for row in findings.rows if row["position"] == width - 1]
    assert last[-1]["layer"] == "model"
    assert last[-1]["top_1"].strip() == "Marcus"
    assert last[-1]["kl"] == pytest.approx(0, abs=1e-5)
    logits = model(input_ids=torch.tensor(task.encoder.encode([PROMPT]))).logits[0]
    for row in findings.rows:
        if row["layer"] == "model":
            assert row["probability_1"] == pytest.approx(float(logits[row["position"]].softmax(-1).max()), abs=1e-5)
    assert findings.figures["predictions"]() is not None


def test_changes_along_a_direction_act_alike_on_the_model_and_its_last_layers_lens(model, task, trained):
    findings = Faithfulness(
        model, task, [trained], FaithfulnessSettings(directions=8, subspace=4, layers=[0, 2])
    ).run()
    assert {(row["change"], row["directions"]) for row in findings.rows} == {
        (change, kind) for change in ("steer", "project", "resample") for kind in ("random", "basis")
    }
    for row in findings.rows:
        assert -1 <= row["magnitude"].mean <= 1
        assert -1 <= row["similarity"].mean <= 1
    # Behind the last block but one the model adds little to the stream of this task: constants say it exactly enough.
    for change in ("steer", "project", "resample"):
        late, early = (
            findings.where(lens="oca", layer=layer, change=change, directions="random")[0] for layer in (2, 0)
        )
        assert late["similarity"].mean > 0.95 > early["similarity"].mean
        assert late["magnitude"].mean > 0.9
    assert findings.facts["steps"]["2"] > 0
    assert findings.figures["faithfulness"]() is not None


def test_a_model_in_bfloat16_is_read_and_changed_too(trained):
    spec = LMSpec(dtype="bfloat16")
    half, task = load_model(spec), IOI(lm=spec, n_test=16, n_means=32)
    compared = CompareLenses(half, task, [trained]).run()
    assert compared.where(lens="oca", layer=2)[0]["kl"].mean < 0.1
    settings = FaithfulnessSettings(directions=4, subspace=4, layers=[2])
    findings = Faithfulness(half, task, [trained], settings).run()
    assert findings.where(lens="oca", change="steer", directions="random")[0]["similarity"].mean > 0.9
    assert ReadPrompt(half, task, [trained]).run().rows


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            CompareLenses,
            CompareLensesSettings(lenses=["oca"]),
            r"lenses names 'oca', which has to be trained: give a run",
        ),
        (CompareLenses, CompareLensesSettings(lenses=["okra"]), "lenses names 'okra'"),
        (CompareLenses, CompareLensesSettings(layers=[3]), r"layers is \[3\]; expected ascending numbers from 0 to 2"),
        (ReadPrompt, LensSettings(lens="resample"), "The resample lens needs other prompts"),
        (Faithfulness, FaithfulnessSettings(lenses=["resample"]), "its effects are not its own"),
    ],
)
def test_what_cannot_work_is_refused(model, task, kind, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        kind(model, task, settings=settings)


def test_layers_that_were_not_trained_and_other_models_are_refused(model, task, trained, tmp_path):
    partial = TrainedLenses("b/run", {"oca": trained.lenses["oca"].at([0, 2])}, 3, 64, trained.provenance)
    assert CompareLenses(model, task, [trained, partial]).layers == [0, 2]
    with pytest.raises(ConfigurationError, match=r"b/run were not trained for the layers \[1\]"):
        CompareLenses(model, task, [trained, partial], CompareLensesSettings(layers=[1]))
    tuned_lens(tmp_path)
    with pytest.raises(ArtefactError, match="to a model with 3 layers of width 8; this model has 3 of width 64"):
        CompareLenses(model, task, settings=CompareLensesSettings(tuned_lens=str(tmp_path))).run()


def test_streams_at_several_positions_are_refused(model):
    task = Induction(n_test=8, length=12, repeated=6, answer_positions="every")
    with pytest.raises(TaskError, match="Streams are changed at one token"):
        Faithfulness(model, task)


def test_the_whole_way_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [
        f"The {word} of the story went on and on, and so did the {word}." for word in ("first", "second", "third")
    ]
    (tmp_path / "text.txt").write_text(" ".join(texts * 120))
    data = ["--data", "Text", "--data.path", "text.txt", "--data.context_length", "16", "--data.scored", "4"]
    few = ["--data.n_test", "8", "--data.n_means", "8", "--data.n_validation", "8", "--data.batches_per_epoch", "2"]
    module = ["--model", "LensModule", "--model.lenses", "[oca,tuned]", "--trainer.max_epochs", "1"]
    assert main(["fit", *module, *data, *few, "--experiment", "read", "--trainer.accelerator", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "KL divergence in nats of the best lenses, on 8 validation prompts" in shown
    run = "runs/read/version_0"
    assert main(["compare_lenses", "--run", run]) == 0
    assert "First layer from which the top token stays the model's" in capsys.readouterr().out
    results = json.loads((tmp_path / run / "studies" / "compare_lenses_0" / "results.json").read_text())
    assert len(results["rows"]) == 5 * 3
    assert main(["lens", "--run", run, "--lens.prompt", "The first of the"]) == 0
    assert "Next token after 'The first of the', predicted by the oca lens" in capsys.readouterr().out
    assert main(["faithfulness", "--run", run]) == 2
    assert "Score the last position alone (Text: scored last)" in capsys.readouterr().err
    words = ["--data.scored", "last", "--faithfulness.directions", "4", "--faithfulness.layers", "[1]"]
    assert main(["faithfulness", "--run", run, *words]) == 0
    assert "Model against lens along random directions" in capsys.readouterr().out
    assert main(["test", "--run", run]) == 0
    assert "test/kl_oca" in capsys.readouterr().out
