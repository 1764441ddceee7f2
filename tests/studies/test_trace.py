"""Causal tracing as a study: the right shares, pieces that add up, and what a user sees and gets wrong."""

import json

import pytest
import torch

from oa_train.ablations.tracing import Tracer, Tracing, answer_probability, corrupted_by_constants, probability_lost
from oa_train.ablations.tracing_constants import TracingConstants
from oa_train.cli.main import main
from oa_train.engine.forward import scored_logits
from oa_train.errors import ArtefactError, ConfigurationError, NotFiniteError, TaskError
from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec
from oa_train.models.weights import fingerprint
from oa_train.studies.trace import Trace
from oa_train.studies.trace_settings import TraceSettings
from oa_train.studies.trace_tables import place
from oa_train.tasks import IOI
from oa_train.tasks.synthetic_facts import SyntheticFacts

LM = LMSpec("facts")
ABLATION_KINDS = ("attention", "residual")


@pytest.fixture(scope="module")
def model():
    return load_model(LM)


@pytest.fixture(scope="module")
def task():
    return SyntheticFacts(lm=LM, n_test=24, n_means=24)


@pytest.fixture(scope="module")
def constants(model):
    tracing = Tracing(5, (0, 1, 2, 3, 4), ABLATION_KINDS, ("-1", "subject_last"))
    generator = torch.Generator().manual_seed(0)
    table = 0.1 * torch.randn(len(tracing), 64, generator=generator)
    return TracingConstants("a/run", tracing, table, {"fingerprint": fingerprint(model)})


@pytest.fixture(scope="module")
def traced(model, task, constants):
    settings = TraceSettings(corruptions=["optimal", "gaussian", "counterfactual"], draws=2, prompts_at_once=10)
    return Trace(model, task, [constants], settings).run()


def test_recovery_is_the_share_of_the_lost_probability(model, task, constants, traced):
    (batch,) = task.batches("test", 24, 24)
    clean = answer_probability(scored_logits(model, batch), batch)
    probabilities = Tracer(model, constants.tracing).probabilities(batch, corrupted_by_constants(constants.table))
    lost = probability_lost(clean, probabilities).mean(dim=1).double()
    for number, run in enumerate(constants.tracing.runs):
        (row,) = traced.where(corruption="optimal", restored=run.kind, at=run.span, layer=run.layer)
        assert row["recovered"].mean == pytest.approx(float(1 - lost[number] / lost[-1]), abs=1e-5)
        assert row["bootstrap_low"] <= row["recovered"].mean + 1e-9
        assert row["bootstrap_high"] >= row["recovered"].mean - 1e-9
        assert row["probability"].mean == pytest.approx(float(probabilities[number].mean()), abs=1e-6)
    (nothing,) = traced.where(corruption="optimal", restored="nothing")
    assert nothing["probability"].mean == pytest.approx(float(probabilities[-1].mean()), abs=1e-6)


def test_the_facts_model_recalls_at_the_last_token_of_the_subject_and_then_at_the_last(traced):
    def recovered(corruption, at, layer):
        (row,) = traced.where(corruption=corruption, restored="residual", at=at, layer=layer)
        return row["recovered"].mean

    for corruption in ("gaussian", "counterfactual"):
        assert recovered(corruption, "subject_last", 1) > 0.9
        assert recovered(corruption, "subject_last", 4) < 0.1
        assert recovered(corruption, "-1", 1) < 0.1
        assert recovered(corruption, "-1", 4) > 0.99


def test_a_study_in_pieces_that_is_resumed_is_the_same(model, task, constants, traced, tmp_path):
    settings = TraceSettings(corruptions=["optimal", "gaussian", "counterfactual"], draws=2, prompts_at_once=10)
    study = Trace(model, task, [constants], settings)
    folder = study.claim(tmp_path)
    study.write(study.answer(), folder)
    assert sorted(file.name for file in (folder / "figures").iterdir()) == ["layers.png", "map.png", "prompt.png"]
    written = (folder / "results.json").read_text()
    pieces = sorted((folder / "pieces").glob("*.safetensors"))
    assert len(pieces) == (1 + 2 + 1) * 3
    (folder / "results.json").unlink()
    pieces[3].unlink()
    again = Trace(model, task, [constants], settings)
    again.resume(folder)
    again.write(again.answer(), folder)
    assert json.loads((folder / "results.json").read_text())["rows"] == json.loads(written)["rows"]
    assert json.loads(written)["rows"][0]["recovered"]["mean"] == traced.rows[0]["recovered"].mean


def test_prompts_that_the_model_does_not_know_are_left_out(task):
    broken = load_model(LM)
    with torch.no_grad():
        broken.transformer.h[0].mlp.c_proj.weight.mul_(0.75)
    findings = Trace(broken, task, settings=TraceSettings(prompt=None, restore=["mlp"], windows=[1], draws=1)).run()
    assert 2 <= findings.facts["n_known"] < 24
    assert findings.facts["n_known"] + findings.facts["n_left_out"] == 24
    with torch.no_grad():
        broken.transformer.wte.weight.zero_()
    with pytest.raises(TaskError, match="so there is no fact whose recall could be traced"):
        Trace(broken, task, settings=TraceSettings(prompt=None)).run()


def test_a_corruption_without_effect_is_told(model, task, constants):
    harmless = Trace(model, task, settings=TraceSettings(prompt=None, noise=1e-12, draws=1))
    with pytest.raises(NotFiniteError, match="Under the corruption gaussian the answers lose no probability"):
        harmless.run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"corruptions": ["optimal"]},
            "names optimal, whose constants have to be trained: run oa-train fit --model",
        ),
        ({"corruptions": ["guassian"]}, "trace.corruptions is 'guassian'"),
        ({"restore": ["neurons"]}, "restore names 'neurons'"),
        ({"layers": [7]}, r"layers is \[7\]"),
        ({"noise": 0.0}, "noise is 0.0; expected more than 0"),
        ({"subject": "sbject"}, r"There is no span 'sbject' in these prompts\. Did you mean subject\?"),
        ({"at": ["object"]}, "There is no span 'object'"),
    ],
)
def test_what_cannot_work_is_told_before_any_work(model, task, settings, message):
    with pytest.raises((ConfigurationError, TaskError), match=message):
        Trace(model, task, settings=TraceSettings(**settings))


def test_constants_that_were_not_trained_for_it_are_refused(model, task, constants, tmp_path):
    with pytest.raises(ConfigurationError, match=r"were trained for attention, residual at -1, subject_last"):
        Trace(model, task, [constants], TraceSettings(windows=[3]))
    with pytest.raises(ConfigurationError, match=r"trace\.prompt is 99; expected 0 to 23"):
        Trace(model, task, [constants], TraceSettings(prompt=99)).run()
    constants.save(tmp_path)
    loaded = TracingConstants.load(tmp_path)
    assert loaded.tracing == constants.tracing
    with pytest.raises(ArtefactError, match="The tracing constants belong"):
        loaded.check_belongs(load_model(LMSpec()))


def test_places_are_spoken():
    names = ("every", "-1", "-3", "subject_last", "subject_first", "subject_next", "S2")
    spoken = ["every token", "last token", "token -3", "last token of subject", "first token of subject"]
    assert [place(name) for name in names] == [*spoken, "token after subject", "S2"]


def test_the_whole_way_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = [
        "--data",
        "SyntheticFacts",
        "--data.batches_per_epoch",
        "2",
        "--data.batch_size",
        "4",
        "--data.n_test",
        "12",
    ]
    module = ["--model", "TracingModule", "--model.windows", "[1]", "--model.restore", "mlp"]
    fit = ["fit", *module, *data, "--lm.name", "facts", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    assert main([*fit, "--experiment", "traced", "--data.n_validation", "12"]) == 0
    shown = capsys.readouterr().out
    assert "Drop in the answers' probability under the best constants, on 12 validation prompts" in shown
    run = "runs/traced/version_0"
    assert main(["trace", "--run", run, "--trace.draws", "1"]) == 0
    shown = capsys.readouterr().out
    assert "12 of 12 test prompts are traced" in shown
    assert "optimal and gaussian" in shown
    results = json.loads((tmp_path / run / "studies" / "trace_0" / "results.json").read_text())
    assert results["n_known"] == 12
    assert len(results["rows"]) == 2 * (1 + 2 * 5)
    assert main(["test", "--run", run]) == 0
    assert "test/probability_lost" in capsys.readouterr().out
    assert main(["compare", "--run", run]) == 2
    message = capsys.readouterr().err
    assert "holds constants of causal tracing, but no circuit: oa-train trace --run runs/traced/version_0" in message
    assert main(["trace", "--run", run, "--trace.windows", "[3]"]) == 2
    assert "train constants for it" in capsys.readouterr().err


def test_facts_in_the_layout_of_known_1000_are_traced(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = []
    for stream, number in (("train", 24), ("validation", 12), ("test", 12)):
        for prompt in (task.prompt(stream, n) for n in range(number)):
            start, end = prompt.spans["subject"]
            subject = {"subject": prompt.text[start:end], "attribute": prompt.answers[0], "split": stream}
            rows.append(json.dumps({"prompt": prompt.text} | subject))
    (tmp_path / "known.jsonl").write_text("\n".join(rows))
    data = ["--data", "Records", "--data.path", "known.jsonl", "--data.layout", "known_1000", "--lm.name", "facts"]
    assert main(["trace", *data, "--trace.draws", "1", "--trace.restore", "[mlp]", "--trace.windows", "[1]"]) == 0
    assert "12 of 12 test prompts are traced" in capsys.readouterr().out
    rows[3] = rows[3].replace('"subject": "', '"subject": "Not ')
    (tmp_path / "known.jsonl").write_text("\n".join(rows))
    assert main(["trace", *data]) == 2
    assert "the subject is not in the prompt" in capsys.readouterr().err


def test_without_a_subject_the_command_says_what_to_do(capsys):
    assert main(["trace", "--data", "Induction", "--experiment", "x"]) == 2
    message = capsys.readouterr().err
    assert "There is no span 'subject' in these prompts" in message


def test_other_tasks_with_other_subjects_work():
    task = IOI(n_test=8, n_means=16)
    settings = TraceSettings(
        subject="S2", at=[-1, "S2"], windows=[1], corruptions=["resample", "mean", "zero"], draws=2
    )
    findings = Trace(load_model(LMSpec()), task, settings=settings).run()
    assert {row["corruption"] for row in findings.rows} == {"resample", "mean", "zero"}
    assert {pair["first"] for pair in findings.facts["agreement"]} == {"resample", "mean"}
