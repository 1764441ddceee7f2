"""`oa-train inspect`: facts without weights, and a self-check with them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from oa_train.cli.main import main
from oa_train.models.families import FAMILIES
from tests.builders import save_language_model

NEOX = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def save_config(name: str, family: str, **options: int) -> None:
    AutoConfig.for_model(family, **options).save_pretrained(name)


def facts_of(capsys: pytest.CaptureFixture, *words: str, status: int = 0) -> dict:
    assert main(["inspect", *words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "edges", "parameters"),
    [
        ({}, 32_491, 124_439_808),
        ({"n_layer": 48, "n_head": 25, "n_embd": 1600}, 2_235_025, 1_557_611_200),
    ],
)
def test_gpt2_small_and_xl_without_weights(capsys, options, edges, parameters):
    save_config("model", "gpt2", **options)
    facts = facts_of(capsys, "--lm.name", "./model", "--lm.dtype", "bfloat16")
    assert facts["edges"] == facts["edge_circuit"]["masks"] == edges
    assert facts["frozen"] == {"parameters": parameters, "bytes": 2 * parameters}


def test_precision_and_strategy_change_what_a_step_takes(capsys):
    save_config("model", "gpt2", n_layer=3)
    whole = facts_of(capsys, "--lm.name", "./model")["step_bytes"]
    mixed = facts_of(capsys, "--lm.name", "./model", "--precision", "bf16-mixed")["step_bytes"]
    again = facts_of(capsys, "--lm.name", "./model", "--recompute", "true")["step_bytes"]
    shared = facts_of(capsys, "--lm.name", "./model", "--strategy", "fsdp", "--devices", "8")
    # Half precision keeps copies of weights in that type beside them.
    assert mixed["activations"] < whole["activations"]
    assert again["activations"] < whole["activations"] / 5
    assert shared["step_bytes"]["weights"] == pytest.approx(whole["weights"] / 8, rel=0.01)
    assert shared["step_bytes"]["gathered"] > 0
    assert (shared["step"]["strategy"], shared["step"]["n_processes"]) == ("fsdp", 8)


def test_facts_of_gpt2_small(capsys):
    save_config("model", "gpt2")
    facts = facts_of(capsys, "--lm.name", "./model", "--n_tokens", "20")
    assert facts["model"]["family"] == "gpt2"
    assert not facts["model"]["parallel"]
    assert not facts["model"]["post_norms"]
    assert facts["sizes"] == {
        "layers": 12,
        "heads": 12,
        "kv_heads": 12,
        "d_head": 64,
        "d_model": 768,
        "vocabulary": 50257,
    }
    assert facts["components"]["count"] == 156
    assert facts["components"]["names"][:2] == ["a0.h0", "a0.h1"]
    assert facts["readers"] == {"count": 445, "q": 144, "k": 144, "v": 144, "mlps": 12, "logits": 1}
    assert facts["sources"] == {"count": 157, "input": 1, "heads": 144, "mlps": 12}
    constants = 12 * (768 + 768)
    assert facts["node_circuit"] == {
        "masks": 156,
        "pooled_constants": constants,
        "total": 156 + constants,
        "constants_by_position": 20 * constants,
        "total_by_position": 156 + 20 * constants,
    }
    assert facts["edge_circuit"]["pooled_constants"] == constants + 768
    parts = dict(facts["step_bytes"])
    assert parts.pop("total") == sum(parts.values())
    assert parts["weights"] >= 4 * 124_439_808


def test_kv_groups_and_parallel_residuals_are_shown(capsys):
    save_config("grouped", "llama", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    readers = facts_of(capsys, "--lm.name", "./grouped")["readers"]
    assert readers == {"count": 19, "q": 8, "k": 4, "v": 4, "mlps": 2, "logits": 1}
    edges = []
    for parallel in (True, False):
        save_config("neox", "gpt_neox", **NEOX, use_parallel_residual=parallel)
        facts = facts_of(capsys, "--lm.name", "./neox")
        assert facts["model"]["parallel"] is parallel
        edges.append(facts["edges"])
    assert edges[1] - edges[0] == 2 * facts["sizes"]["heads"]


def test_the_tables(capsys):
    assert main(["inspect", "--lm.name", "tiny", "--check"]) == 0
    said = capsys.readouterr().out
    for words in ("262", "12 q, 12 k, 12 v, 3 MLPs, logits", "128,768", "activations", "self-check in float64"):
        assert words in said
    assert said.count("passed") == 15
    assert "failed" not in said


def test_check_as_json_with_a_configuration_file(capsys):
    save_language_model("olmo2", Path("model"))
    Path("lm.yaml").write_text("lm: {name: ./model}\nbatch_size: 2")
    facts = facts_of(capsys, "--config", "lm.yaml", "--check")
    assert facts["model"]["post_norms"]
    assert facts["step"]["batch_size"] == 2
    assert facts["checked_in"] == "float64"
    assert len(facts["checks"]) == 15
    assert all(check["passed"] for check in facts["checks"])


@pytest.mark.parametrize("shown", [[], ["--json"]])
def test_a_wrong_entry_ends_with_status_1_and_names_the_failed_checks(capsys, monkeypatch, shown):
    save_language_model("llama", Path("model"))
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], mlp="self_attn"))
    assert main(["inspect", "--lm.name", "./model", "--check", *shown]) == 1
    captured = capsys.readouterr()
    assert "failed: " in captured.err
    assert "blocks add their constants and nothing else" in captured.err
    assert "docs/extending.md" in captured.err
    assert "Traceback" not in captured.err
    if shown:
        failed = [check for check in json.loads(captured.out)["checks"] if not check["passed"]]
        assert any(check["figure"] is None and check["problem"] for check in failed)
    else:
        assert "failed" in captured.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lm.name ./rwkv", "docs/extending.md shows how"),
        ("--lm.name ./gpt2 --check", "gpt2' cannot be loaded"),
        ("--lm.name ./nowhere", "lm.name is './nowhere', which does not exist"),
        ("--batch_size 0", "batch_size is 0; expected at least 1."),
        ("--n_tokens 49", "n_tokens is 49; this model has 48 positions."),
        ("--chekc", "There is no option --chekc. Did you mean check"),
        ("--devices 8", "devices is 8, which needs a strategy: ddp or fsdp."),
        ("--precision bf16-true", "precision is bf16-true, a frozen model in bfloat16, and lm.dtype is float32"),
        ("--precision bf16", "precision is 'bf16'; expected one of 32-true, bf16-mixed"),
        ("--strategy deepspeed", "strategy is 'deepspeed'; expected one of auto, ddp, fsdp."),
    ],
)
def test_mistakes(capsys, words, said):
    save_config("rwkv", "rwkv")
    save_config("gpt2", "gpt2")
    assert main(["inspect", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_path_that_leads_nowhere_is_found_without_weights(capsys, monkeypatch):
    save_config("gpt2", "gpt2")
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], mlp="mpl"))
    assert main(["inspect", "--lm.name", "./gpt2"]) == 2
    assert "not built as its entry in the family table says" in capsys.readouterr().err
