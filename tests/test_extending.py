"""The files that docs/extending.md shows do what the page says, each by itself and on the command line."""

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from types import ModuleType

import pytest
import torch

from oa_train import Circuit, CircuitModule, LMSpec, Nodes, TaskData, TrainedCircuit, TrainedLenses, load_model
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource
from oa_train.cli.main import main
from oa_train.diagnostics.selfcheck import self_check
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.errors import ModelError
from oa_train.lenses.lens import LENS_KINDS
from oa_train.models.families import FAMILIES, Family
from oa_train.models.frozen import CausalLM
from oa_train.models.parts import find_parts
from oa_train.models.sites import SITE_KINDS, Site
from oa_train.tasks.file_formats import FILE_READERS
from oa_train.tasks.layouts import LAYOUTS
from tests.builders import quiet_trainer, random_constants, random_mask, small_ioi, tiny_model
from tests.precision import WithoutSinglePrecision

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
# Files are shown in blocks, their names before them: alone on a line, or at the end of a sentence.
FILES = dict(re.findall(r"`(\w+\.(?:py|yaml))`:\n\n```(?:python|yaml)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
REGISTRIES: list[dict] = [SITE_KINDS, ABLATION_KINDS, FAMILIES, LENS_KINDS, FILE_READERS, LAYOUTS]

# What makes a training a matter of seconds.
SHORT = [
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--finish.refit.steps", "1", "--finish.refit.batch_size", "4"),
    *("--data.n_validation", "8", "--data.n_test", "8", "--data.n_means", "16", "--data.batch_size", "4"),
]
TINY = ["--config", str(ROOT / "configs" / "circuit_nodes_tiny.yaml")]

Import = Callable[[str], ModuleType]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Imports a file of the page from the current folder; what it enters in a table is taken out at the end."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = [dict(registry) for registry in REGISTRIES]
    importlib.invalidate_caches()
    yield importlib.import_module
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


def test_every_file_of_the_page_is_run_here():
    assert FILES.keys() == {
        *("mlp_reads.py", "sign_flip.py", "half_mean.py", "straight_through.py", "straight_through.yaml"),
        *("repetition.py", "repetition.yaml", "receivers.py", "mistral.py", "layers.py", "layers.yaml"),
        *("quiz.py", "scale_lens.py"),
    }


def test_a_kind_of_site_is_read_replaced_and_trained(imported, capsys):
    imported("mlp_reads")
    model = tiny_model("llama")
    nodes = Nodes.of(model.config, ["heads", "mlp_reads"])
    assert nodes.names[4:6] == ("x0", "a1.h0")
    task = small_ioi()
    module = CircuitModule(sites=["heads", "mlp_reads"], samples_per_prompt=2)
    quiet_trainer(max_steps=2).fit(module, datamodule=TaskData(task))
    assert module.replacements.constants.by_site()[Site("mlp_reads", 1)].abs().sum() > 0
    # The block that the page shows below it.
    exec(re.search(r"```python\n(import mlp_reads.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith("15 x2")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "olmo2", "opt"])
def test_the_kind_of_site_of_the_page_obeys_the_laws(imported, family):
    imported("mlp_reads")
    with WithoutSinglePrecision():
        model = tiny_model(family)
        nodes = Nodes.of(model.config, ["mlp_reads"])
        batch = small_batch()
        values = random_constants(nodes).replacements(batch)
        clean = scored_logits(model, batch)
        kept = masked_logits(model, batch, nodes, torch.ones(2, len(nodes), dtype=torch.float64), values)
        assert torch.allclose(kept, clean, rtol=0, atol=1e-12)
        mixed = masked_logits(model, batch, nodes, random_mask(2, len(nodes)), values)
        assert not torch.allclose(mixed, clean, rtol=0, atol=1e-6)


def small_batch():
    from tests.builders import random_batch

    return random_batch([6, 4])


def test_an_own_kind_of_site_can_be_used_on_the_command_line(imported):
    imported("mlp_reads")
    assert main(["fit", *TINY, "--model.sites", "[heads, mlp_reads]", "--experiment", "reads", *SHORT]) == 0
    run = TrainedCircuit.load("runs/reads/version_0")
    assert run.circuit.level.kinds == ("heads", "mlp_reads")


@pytest.mark.parametrize("name", ["sign_flip", "half_mean"])
def test_an_own_ablation_trains_and_evaluates(imported, name):
    imported(name)
    task = small_ioi()
    model = load_model(LMSpec("tiny"))
    nodes = Nodes.of(model.config, ["mlp"], ["m*@-1"])
    ablation = ABLATION_KINDS[name].prepare(AblationSource(model, task, nodes))
    masks = torch.tensor([[True, True, True], [True, False, True]])
    whole, without = circuit_behaviour(model, task.batches("test", 8), nodes, masks, [ablation]).kl.mean(dim=1)
    assert whole < 1e-6 < without
    assert main(["fit", *TINY, "--model.ablation", name, "--experiment", name, *SHORT]) == 0
    assert TrainedCircuit.load(f"runs/{name}/version_0").ablation == name


def test_the_negative_of_a_value_replaces_it(imported):
    flipped = imported("sign_flip").SignFlip()
    model = tiny_model("gpt2")
    batch = small_batch()
    from oa_train.engine.reading import read_values

    nodes = Nodes.of(model.config)
    values = flipped.replacements(batch, lambda prompts: read_values(model, prompts, nodes))
    site = Site("mlp", 1)
    assert torch.equal(values[site], -read_values(model, batch, nodes)[site])


def test_an_own_mask_distribution_is_chosen_by_an_overlay(imported):
    distribution = imported("straight_through").StraightThrough(3)
    drawn = distribution.sample(torch.tensor([[0.1, 0.7, 0.9]]))
    assert torch.equal(drawn.detach(), torch.tensor([[1.0, 1.0, 0.0]]))
    assert main(["fit", *TINY, "--config", "straight_through.yaml", *SHORT]) == 0
    circuit = Circuit.load("runs/circuit_nodes_tiny/version_0/circuit")
    assert circuit.provenance["training"]["masks"] == {"class": "StraightThrough"}


def test_an_own_grammar_is_chosen_by_a_configuration(imported):
    task = imported("repetition").Repetition(n_test=8)
    batch = task.batch("test", 0, 8)
    rows = torch.arange(8)
    answered = batch.tokens[batch.spans["first"].roll(1, dims=1)]
    assert torch.equal(answered, batch.answers[rows, 0, 0])
    assert main(["fit", "--config", "repetition.yaml", *SHORT]) == 0
    level = TrainedCircuit.load("runs/repetition/version_0").circuit.level
    assert level.spans == (None, "first")


def test_own_fixed_prompts_are_scored_once_each(imported):
    receivers = imported("receivers")
    task = receivers.Receivers()
    texts = {stream: [prompt.text for prompt in prompts] for stream, prompts in task.prompts.items()}
    assert sorted(text for some in texts.values() for text in some) == sorted(p.text for p in receivers.PROMPTS)
    assert all(texts.values())
    assert task.n_test == len(texts["test"])
    assert main(["fit", *TINY, "--data", "receivers.Receivers", "--experiment", "receivers", *SHORT]) == 0


def test_an_own_study_goes_from_its_options_to_results_table_and_figure(imported, capsys):
    layers = imported("layers")
    assert main(["study", "layers.Layers", "--config", "layers.yaml", "--device", "cpu"]) == 0
    assert "One layer under resample ablation" in capsys.readouterr().out
    written = Path("runs/layers/version_0/studies/layers_0")
    results = json.loads((written / "results.json").read_text())
    assert [row["layer"] for row in results["rows"]] == [0, 1, 2]
    assert results["settings"] == {"ablation": "resample", "positions": 1}
    assert (written / "figures" / "layers.png").stat().st_size > 5_000
    findings = layers.Layers(load_model(LMSpec()), small_ioi(n_test=64), settings=layers.LayersSettings()).run()
    frame = findings.to_frame()
    assert list(frame["kl"]) == [row["kl"].mean for row in findings.rows]
    assert {"kl_stderr", "kl_low", "kl_high"} < set(frame.columns)
    table = (written / "tables" / "layers.csv").read_text().splitlines()
    assert table[0].split(",") == list(frame.columns)
    # The run folder that was made can be asked again.
    assert main(["study", "layers.Layers", "--run", "runs/layers/version_0", "--layers.ablation", "mean"]) == 0
    assert (written.parent / "layers_1" / "results.json").is_file()
    assert main(["study", "layers.Layer", "--config", "layers.yaml"]) == 2
    assert "layers has no study named 'Layer'. Did you mean Layers" in capsys.readouterr().err


def test_an_own_family_passes_the_self_check(imported):
    ours = FAMILIES.pop("mistral")
    try:
        model = tiny_model("mistral")
        with pytest.raises(ModelError, match="not supported"):
            find_parts(model)
        imported("mistral")
        assert FAMILIES["mistral"] == ours
        check_family(model)
    finally:
        FAMILIES["mistral"] = ours


def check_family(model: CausalLM) -> None:
    with WithoutSinglePrecision():
        failed = [check.name for check in self_check(model) if not check.passed]
    assert failed == []


def test_the_tables_of_the_page_have_every_field_and_check():
    fields = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert set(Family.__dataclass_fields__) <= fields
    assert set(SITE_KINDS["mlp"].__dataclass_fields__) <= fields
    assert set(ABLATION_KINDS["mean"].__dataclass_fields__) <= fields
    with WithoutSinglePrecision():
        checks = [check.name for check in self_check(tiny_model("gpt2"))]
    assert [name for name in checks if f"| {name} |" not in PAGE] == []


def test_an_own_format_of_prompts_is_read_by_its_suffix_and_layout(imported, capsys):
    imported("quiz")
    questions = [
        f"{{question: '{giver} and {receiver} met. {giver} gave a book to', right: {receiver}, wrong: [{giver}]}}"
        for giver, receiver in permutations(("Paul", "Mark", "Tom", "Ben", "Peter", "Arthur"), 2)
    ]
    Path("quiz.yaml").write_text("".join(f"- {question}\n" for question in questions))
    assert main(["check-data", "--data", "Records", "--data.path", "quiz.yaml", "--data.layout", "quiz"]) == 0
    shown = capsys.readouterr().out
    assert "train 0, item " in shown
    assert " against '" in shown
    Path("quiz.yaml").write_text("- {question: Who, right: Paul}\n" + Path("quiz.yaml").read_text())
    assert main(["check-data", "--data", "Records", "--data.path", "quiz.yaml", "--data.layout", "quiz"]) == 2
    assert "no value for the field 'wrong'" in capsys.readouterr().err


def test_an_own_lens_is_trained_stored_and_compared(imported):
    imported("scale_lens")
    words = ["--lm.name", "tiny", "--data", "IOI", "--model", "LensModule", "--model.lenses", "[scale, tuned]", *SHORT]
    assert main(["fit", "--experiment", "lenses", *words]) == 0
    run = Path("runs/lenses/version_0")
    factor = TrainedLenses.load(run).lenses["scale"].factor
    assert factor.shape[1:] == (1, 1)
    assert not torch.equal(factor, torch.ones_like(factor))
    assert main(["compare_lenses", "--run", str(run)]) == 0
    written = json.loads((run / "studies" / "compare_lenses_0" / "results.json").read_text())
    assert {row["lens"] for row in written["rows"]} >= {"scale", "tuned", "logit", "mean"}
